"""One real sweep, trained, killed and started again."""

import csv
import subprocess
import sys
import time

import pytest
import tiny
import yaml


@pytest.mark.slow
def test_two_losses_with_two_seeds_killed_once_end_as_if_they_were_not(tmp_path):
    data, teacher = tiny.write_data(tmp_path / "data"), tiny.write_teacher(tmp_path / "teacher")
    evaluated = [{"path": str(data), "name": "test"}]
    plain = tiny.config(tmp_path / "unused", data, teacher, data__eval=evaluated, training__steps=60)
    plain["training"]["checkpoint_every"] = 5
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    axes = {"loss": {"taid": {}, "kl": {"loss": [{"name": "forward_kl"}]}}, "training.seed": [0, 1]}
    tables = {}
    for name in ("whole", "killed"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"config": "run.yaml", "output": str(tmp_path / name), "axes": axes}))
        command = [sys.executable, "-m", "vlm_distill.cli", "sweep", str(path), "--jobs", "2"]
        if name == "killed":
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            checkpoint = tmp_path / "killed/kl/seed0/checkpoints/step_5"
            while not checkpoint.exists() and process.poll() is None:
                time.sleep(0.1)
            process.kill()
            process.wait()
            assert not (tmp_path / "killed/kl/seed0/summary.json").exists()
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert (tmp_path / name / "sweep.html").is_file()
        with (tmp_path / name / "sweep.csv").open() as file:
            tables[name] = [(row["loss"], row["seed"], row["test.exact"]) for row in csv.DictReader(file)]
    assert "resum" in (tmp_path / "killed/kl/seed0.train.log").read_text()
    assert tables["whole"] == tables["killed"]
    assert len(tables["whole"]) == 4
