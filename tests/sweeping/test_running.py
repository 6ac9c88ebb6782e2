"""A sweep's processes: shares of the machine, failures, kills, resuming; the runs are stubs that take no training."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_runs
import yaml
from run_files import write

from data.errors import UserError
from vlm_distill.sweeping.command import commands, run_sweep
from vlm_distill.sweeping.grid import read_sweep
from vlm_distill.sweeping.running import Job, Machine, run_jobs

LOSSES = {"kl": {"loss.0.name": "forward_kl"}, "taid": {}}


def write_sweep(folder, name="sweep", *, steps=2, seeds=(0, 1), **changes):
    write(folder, {"loss": [{"name": "taid"}], "training": {"steps": steps, "batch_size": 64}})
    plain = {"config": "run.yaml", "output": str(folder / "runs" / name)}
    plain["axes"] = {"loss": LOSSES, "training.seed": list(seeds)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plain | changes, sort_keys=False))
    return path


def run(path, at_once=2):
    return run_sweep(read_sweep(path), at_once, 1, sweep_runs.stub)


def program(path):
    """A sweep of stubs in a process of its own."""
    words = [sys.executable, sweep_runs.__file__, "sweep", str(path), "2"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def under_way(folder):
    """How far the runs of stubs are: steps by run."""
    return {path: path.read_text() for path in folder.glob("runs/sweep/*/*/steps")}


def test_a_failed_run_is_named_with_its_last_line_and_skipped(tmp_path, capfd):
    path = write_sweep(tmp_path, seeds=(sweep_runs.BAD_SEED, 1))
    failures = run(path)
    assert sorted(failure.job.name for failure in failures) == ["kl/seed13", "taid/seed13"]
    assert {failure.said for failure in failures} == {"data.train: nothing is there"}
    assert failures[0].code == 2
    assert "step 3 went well" in failures[0].job.log.read_text()
    said = capfd.readouterr().out
    assert "kl/seed13: FAILED: data.train: nothing is there" in said
    assert "[4/4]" in said
    assert "taid/seed1: test: Accuracy, % 61" in said


def test_finished_runs_are_not_run_again(tmp_path):
    path = write_sweep(tmp_path, seeds=(sweep_runs.BAD_SEED, 1))
    run(path)
    run(path)
    runs = tmp_path / "runs/sweep"
    assert (runs / "taid/seed1/starts").read_text() == "0\n"
    assert (runs / "taid/seed13/starts").read_text() == "0\n2\n"


@pytest.mark.slow
def test_a_sweep_killed_twice_ends_with_the_same_table(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (write_sweep(tmp_path / name, steps=30) for name in ("whole", "killed"))
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = under_way(tmp_path / "killed")
        process = program(killed)
        while under_way(tmp_path / "killed") == before:
            time.sleep(0.05)
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == (143 if number == signal.SIGTERM else -number)
        assert ("each writes a checkpoint" in errors) == (number == signal.SIGTERM)
        time.sleep(1)
        still = subprocess.run(["pgrep", "-f", str(killed.parent / "run.yaml")], capture_output=True, text=True)
        assert still.stdout == ""
    tables = []
    for path in (whole, killed):
        process = program(path)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        tables.append(said[said.rindex("test: Accuracy") :].partition(str(path.parent))[0])
    assert tables[0] == tables[1]
    assert "no difference shown" in tables[0] or "better" in tables[0]
    starts = sorted((tmp_path / "killed").glob("runs/sweep/*/*/starts"))
    resumed = [int(path.read_text().split()[-1]) for path in starts if len(path.read_text().split()) > 1]
    assert resumed
    assert all(resumed)


def test_a_finished_run_with_other_settings_is_refused(tmp_path):
    path = write_sweep(tmp_path)
    run(path)
    write_sweep(tmp_path, steps=3)
    with pytest.raises(UserError, match=r"seed0: finished with training.steps 2, and the sweep says 3; choose another"):
        run(path)


def test_caches_are_filled_and_other_sweeps_run_first(tmp_path):
    write_sweep(tmp_path, "teachers", seeds=(7,))
    cached = {"teacher.cache.folder": str(tmp_path / "cache")}
    path = write_sweep(tmp_path, first=["teachers.yaml"], overrides=cached)
    teachers, caches, runs = commands(read_sweep(path), 1)
    assert [len(teachers), len(caches), len(runs)] == [2, 1, 4]
    assert caches[0].startswith("vlm-distill cache ")
    assert run(path) == []
    filled = (tmp_path / "cache/filled").stat().st_mtime
    for folder, before in (("teachers", True), ("sweep", False)):
        for summary in (tmp_path / "runs" / folder).rglob("summary.json"):
            assert (summary.stat().st_mtime < filled) == before
    assert commands(read_sweep(path), 1) == []


def test_a_sweep_whose_teachers_failed_does_not_start(tmp_path):
    write_sweep(tmp_path, "teachers", seeds=(sweep_runs.BAD_SEED,))
    path = write_sweep(tmp_path, first=["teachers.yaml"])
    with pytest.raises(UserError, match=r"teachers.yaml: 2 of its runs failed"):
        run(path)
    assert not (tmp_path / "runs/sweep").exists()


def test_commands_are_printed_for_a_scheduler(tmp_path, command):
    path = write_sweep(tmp_path)
    code, said, errors = command("sweep", path, "--print")
    assert (code, errors) == (0, "")
    lines = said.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"vlm-distill train {tmp_path / 'run.yaml'} ")
    assert lines[0].endswith(f"training.seed=0 output={tmp_path / 'runs/sweep/kl/seed0'}")
    assert command("sweep", path, "--print", "--nproc", 1)[1].startswith(f"{lines[0]} --nproc 1\n")
    sweep_runs.finish(read_sweep(path).runs[0], 0.5)
    assert command("sweep", path, "--print")[1].splitlines() == lines[1:]
    for finished in read_sweep(path).runs[1:]:
        sweep_runs.finish(finished, 0.5)
    assert command("sweep", path, "--print") == (0, "", f"{path}: all 4 runs are finished\n")


def test_each_run_gets_its_share_of_the_machine(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("vlm_distill.sweeping.running.cores", lambda: 16)
    machine = Machine(at_once=2, nproc=2)
    shares = [machine.environment(slot) for slot in (0, 1)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4,5", "6,7"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"4"}
    # More runs than GPUs: they share them in turn.
    crowded = Machine(at_once=6, nproc=1)
    assert [crowded.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(6)] == list("456745")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Machine(at_once=1, nproc=1).environment(0)["CUDA_VISIBLE_DEVICES"] == ""


def test_no_more_jobs_run_at_once_than_asked(tmp_path):
    code = "import sys, time; t = time.time(); time.sleep(0.3); print(t, time.time())"
    jobs = [Job(str(k), [sys.executable, "-c", code], tmp_path / f"{k}.log") for k in range(5)]
    assert run_jobs(jobs, Machine(2, 1), lambda *_: None) == []
    spans = [tuple(map(float, Path(job.log).read_text().split())) for job in jobs]
    for start, _ in spans:
        assert sum(begin <= start < end for begin, end in spans) <= 2


def test_a_killed_run_is_reported_by_its_signal(tmp_path):
    job = Job("x", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "x.log")
    (failed,) = run_jobs([job], Machine(1, 1), lambda *_: None)
    assert failed.said == "killed by SIGKILL"


def test_the_csv_has_a_row_for_each_run(tmp_path):
    path = write_sweep(tmp_path)
    process = program(path)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    assert re.search(r"taid +2 +60.50 ± 0.71 +\+10.0 ± 0.0 +better", said)
    lines = (tmp_path / "runs/sweep/sweep.csv").read_text().splitlines()
    assert lines[0].startswith("loss,seed,test.exact,test.kind.exact,seconds,peak_bytes")
    assert len(lines) == 5
    assert lines[2].startswith("taid,0,0.6,0.6,10.0,1048576,1000,2000,")
    assert json.loads((tmp_path / "runs/sweep/taid/seed0/summary.json").read_text())["steps"] == 10
