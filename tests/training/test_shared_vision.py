"""A frozen vision encoder that student and teacher have in common runs once a micro-batch, and nothing else changes."""

import json

import pytest
import tiny
import torch
from counted_runs import trained

from vlm_distill import run as module
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.shared_vision import has_same_vision
from vlm_distill.trainer import Trainer

FROZEN = {"from_teacher": {"layers": 2}, "train": ["projector", "decoder"]}
LOSS = [{"name": "taid", "t_start": 0.4}, {"name": "projector_features", "weight": 0.5}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared_vision")
    # Micro-batches with two images, one, none, and no sample at all.
    tiny.write_data(folder, text_only=(0, 1, 2, 3, 8, 9, 14, 15), broken=(4, 5, 6, 7, 20))
    tiny.write_teacher(folder / "teacher")
    return folder


def settings(folder, run="run", **changes):
    changes = {"student": FROZEN, "loss": LOSS, "training__steps": 3, **changes}
    plain = tiny.config(folder / run, folder / "data.jsonl", folder / "teacher", **changes)
    return RunConfig.model_validate(plain)


@pytest.mark.parametrize("packing", [False, True])
def test_the_encoder_runs_once_and_nothing_else_changes(folder, processes, monkeypatch, packing):
    config = settings(folder, f"once{packing}", data__packing=packing)
    once = trained(config, processes)
    monkeypatch.setattr(module, "has_same_vision", lambda *_: False)
    twice = trained(settings(folder, f"twice{packing}", data__packing=packing), processes)
    assert (once.trainer.shared_vision, twice.trainer.shared_vision) == (True, False)
    # Three steps of four micro-batches.
    assert once.calls == {"student": 0, "teacher": 12}
    assert twice.calls == {"student": 12, "teacher": 12}
    assert once.losses == pytest.approx(twice.losses, rel=1e-5)
    for name, weight in once.weights.items():
        assert (weight - twice.weights[name]).abs().max() < 1e-5, name


def test_it_is_said_in_the_run(folder, processes, capsys):
    path = Trainer(settings(folder, "said", training__steps=1), processes).run()
    assert "runs once, for both" in " ".join(capsys.readouterr().err.split())
    assert json.loads((path / "summary.json").read_text())["steps"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"from_teacher": {"layers": 2}}},  # it trains
        {"student": {**tiny.settings(), "train": ["projector", "decoder"]}},  # another one
        {"student": {**tiny.settings(width=24), "train": ["projector", "decoder"]}},  # of the same shape
        {"teacher__dtype": "bf16"},  # in another precision
        {"loss": [{"name": "cross_entropy"}]},  # a teacher that is not asked
    ],
)
def test_where_it_runs_twice(folder, processes, changes):
    assert not Trainer(settings(folder, "other", **changes), processes).shared_vision


def test_weights_decide(folder):
    from vlm_distill.models import load_vlm

    student, teacher = (load_vlm(folder / "teacher") for _ in range(2))
    assert not has_same_vision(student, teacher)
    student.set_trainable(["projector", "decoder"])
    assert has_same_vision(student, teacher)
    assert has_same_vision(student, teacher.to(torch.bfloat16))
    with torch.no_grad():
        next(student.vision_encoder.parameters()).flatten()[0] += 1
    assert not has_same_vision(student, teacher)
