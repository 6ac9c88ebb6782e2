"""Smoke runs: little of everything, in a folder that no real run takes for its own."""

import json

import pictures
import pytest
import tiny
import yaml

from data.errors import UserError
from vision import train as classify
from vision.config import ClassifierConfig
from vlm_distill import cli, train
from vlm_distill.cli.smoke import QUESTIONS, STEPS, is_smoke, smoke_config, write_smoke_run
from vlm_distill.config import shipped
from vlm_distill.config.file import load_config, save_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.reporting.report import write_report

KINDS = {"train": (RunConfig, train.main), "classify": (ClassifierConfig, classify.main)}


@pytest.fixture(params=KINDS)
def run(request, tmp_path):
    """A command, its run's file and the run's folder."""
    if request.param == "train":
        data = tiny.write_data(tmp_path / "data", rows=80)
        more = {"training__checkpoint_every": 9, "training__steps": 500}
        plain = tiny.config(tmp_path / "runs/real", data, tiny.write_teacher(tmp_path / "teacher"), **more)
        plain["data"]["eval"] = [{"path": str(data), "name": "held_out"}]
        plain["evaluation"] |= {"every": 100, "best": "held_out"}
    else:
        images = pictures.make_images(tmp_path / "images", per_class=8)
        plain = pictures.config(tmp_path / "runs/real", images, tmp_path)
        plain["training"] = {"epochs": 300, "batch_size": 16, "device": "cpu"}
        plain["teacher"] = pictures.vit(cache=str(tmp_path / "cache"))
        plain["data"] |= {"fixed_views": 2, "eval": [{"path": str(images), "name": "held_out"}]}
        plain["evaluation"] = {"every_epochs": 1, "best": "held_out"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain))
    return request.param, path, tmp_path / "runs/real"


def started(command, monkeypatch, *words):
    """Run a command up to where it starts ranks; return their words."""
    ranks = []
    monkeypatch.setattr(cli.training, "launch_training", lambda module, words, nproc: ranks.append(words) or 0)
    code, _, errors = command(*words)
    assert code == 0, errors
    return ranks[0]


def test_a_smoke_run_tries_everything_and_leaves_the_real_run_alone(run, command, monkeypatch, capsys):
    name, path, real = run
    words = started(command, monkeypatch, name, path, "--smoke", "--nproc", 1)
    smoke = real.with_name("real-smoke")
    assert words == [str(smoke / "smoke.yaml")]
    main = KINDS[name][1]
    assert main(words) == 0
    assert f"the smoke run works: {STEPS} steps of " in capsys.readouterr().err.replace("\n", " ")

    # Few steps, an evaluation on the way, few questions at the end, a best student, checkpoints, the student's files.
    lines = [json.loads(line) for line in (smoke / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [*range(1, STEPS + 1)]
    assert {line["step"] for line in lines if line["kind"] == "eval"} == {STEPS // 2, STEPS}
    assert {line["n"] for line in lines if line["kind"] == "eval"} == {QUESTIONS}
    for part in ("best", "student", f"checkpoints/step_{STEPS}", "evaluation/held_out/teacher/scores.json"):
        assert (smoke / part).exists(), part
    assert not real.exists()
    assert not (real.parent.parent / "cache").exists()

    # Nothing takes it for the real run.
    assert is_smoke(smoke)
    assert main([str(path), f"output={smoke}", f"training.steps={STEPS}"]) == 2
    assert "training.smoke" in capsys.readouterr().err
    code, _, errors = command("export", smoke, smoke / "out")
    assert code == 2
    assert "is a smoke run, whose student is not a result" in errors
    assert "real-smoke (smoke run)" in write_report([smoke]).read_text()

    # The next one starts afresh, even if this one was interrupted.
    (smoke / "config.yaml").unlink()
    started(command, monkeypatch, name, path, "--smoke", "--nproc", 1)
    assert {file.name for file in smoke.iterdir()} == {".lock", "smoke.yaml"}


def test_a_folder_of_something_else_is_kept(run, command):
    name, path, real = run
    smoke = real.with_name("real-smoke")
    smoke.mkdir(parents=True)
    (smoke / "mine.txt").write_text("mine")
    code, _, errors = command(name, path, "--smoke", "--nproc", 1)
    assert code == 2
    assert errors == f"vlm-distill: --smoke: {smoke}: holds something other than a smoke run; move it away\n"
    # Not even a real run of this name.
    (smoke / "mine.txt").unlink()
    save_config(load_config(path, (), KINDS[name][0]), smoke / "config.yaml")
    with pytest.raises(UserError, match="holds something other than a smoke run"):
        write_smoke_run(load_config(path, (), KINDS[name][0]), path)


@pytest.mark.parametrize("name", [name for name in shipped.names() if shipped.command_of(name) in KINDS])
def test_every_shipped_configuration_has_a_smoke_run(name):
    config = load_config(shipped.FOLDER / f"{name}.yaml", (), KINDS[shipped.command_of(name)][0])
    smoke = smoke_config(config)
    assert smoke.output == f"{config.output}-smoke"
    assert (smoke.training.steps, smoke.training.epochs) == (STEPS, None)
    assert smoke.training.batch_size == config.training.batch_size
    assert [term.name for term in smoke.loss] == [term.name for term in config.loss]
    rows = [source.limit for source in smoke.data.train]
    if None not in rows:
        assert all(now <= (before.limit or now) for now, before in zip(rows, config.data.train, strict=True))
