import json
import sys
import types

import pytest

from data.errors import UserError
from vlm_distill.config.sections import TrainingSection
from vlm_distill.runtime.tracking import Tracker


def track(folder, start, lines):
    with Tracker(folder, 10, start, first=True, wandb=False, settings={}) as tracker:
        for step, loss in lines:
            tracker.log("train", step, {"loss": loss})


def test_resume_cuts_back_to_the_checkpoint(tmp_path):
    track(tmp_path, 0, [(1, 0.9), (2, 0.8), (3, 0.7)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # the line that a crash cut off
    track(tmp_path, 2, [(3, 0.71)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.9), (2, 0.8), (3, 0.71)]


def test_the_last_evaluation_is_told_again(tmp_path):
    track(tmp_path, 0, [(10, 0.9)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 9}\n{"kind": "eval", "step": 10}\n')
    track(tmp_path, 10, [])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 10), ("eval", 9)]


def test_tensorboard_is_written(tmp_path):
    track(tmp_path, 0, [(1, 0.9)])
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_other_ranks_write_nothing(tmp_path):
    with Tracker(tmp_path, 10, 0, first=False, wandb=False, settings={}) as tracker:
        tracker.log("train", 1, {"loss": 1.0})
        tracker.show(1, "loss 1")
        tracker.say("hello")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def client(monkeypatch):
    """Stands for W&B: keeps what it is given."""
    client = types.SimpleNamespace(given=[], logged=[])

    def init(**given):
        client.given.append(given)
        return types.SimpleNamespace(log=lambda values, step: client.logged.append(step), finish=lambda: None)

    client.init = init
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


def test_a_resumed_run_is_the_same_one_in_wandb(tmp_path, client):
    settings = {"project": "p", "group": "g", "tags": ["a", "b"], "mode": "offline"}
    section = TrainingSection(steps=1, wandb=settings).wandb
    for start, wandb in ((0, section), (2, section), (0, True)):
        folder = tmp_path / ("run" if wandb is section else "other")
        folder.mkdir(exist_ok=True)
        with Tracker(folder, 10, start, first=True, wandb=wandb, settings={"seed": 1}) as tracker:
            tracker.log("train", start + 1, {"loss": 1.0})
    first, resumed, other = client.given
    assert first == resumed
    assert first["id"] != other["id"]
    expected = settings | {"name": "run", "resume": "allow"}
    assert {key: first[key] for key in expected} == expected
    assert "project" not in other
    assert client.logged == [1, 3, 1]


def test_wandb_without_a_key_is_a_persons_mistake(tmp_path, client):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty).\ncall wandb.login")

    client.init = refuse
    with pytest.raises(UserError, match=r"training.wandb: api_key not configured .* training.wandb.mode=offline"):
        Tracker(tmp_path, 10, 0, first=True, wandb=True, settings={})


def test_square_brackets_are_printed_as_they_are(tmp_path, capsys):
    folder = tmp_path / "run [bold] [x]"
    folder.mkdir()
    with Tracker(folder, 10, 0, first=True, wandb=False, settings={}) as tracker:
        tracker.say("[/red] written to [data] :smile:")
        tracker.warn("no [/] such")
        tracker.show(10, "a[/] 1")
    told = capsys.readouterr().err
    assert "[/red] written to [data] :smile:" in told
    assert "warning: no [/] such" in told
    assert "a[/] 1" in told
