"""What the engine does on one rank, and with checkpoints of other ZeRO stages."""

import json

import pytest
import tiny
import torch
from torch import nn

from data.errors import UserError
from vision.config import ClassifierConfig
from vlm_distill.config.sections import RunConfig
from vlm_distill.trainer import Trainer
from vlm_distill.training.engine import Engine


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.unread = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, factor):
        return (factor * self.read).sum()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_parameter_that_no_loss_reaches_is_decayed_as_on_many_ranks(processes, accumulation):
    config = ClassifierConfig.model_validate(
        {
            "student": {"name": "x"},
            "loss": [{"name": "cross_entropy"}],
            "data": {"train": [{"path": "x"}]},
            "training": {"steps": 1, "batch_size": accumulation, "micro_batch_size": 1, "device": "cpu"},
            "output": "x",
        }
    )
    task = Task()
    engine = Engine(task, torch.optim.SGD(task.parameters(), lr=1.0, weight_decay=0.5), config, processes)
    for _ in range(accumulation):
        engine.backward(engine(0.25))
        engine.step(1.0)
    assert task.read.tolist() == [1 - 0.25 * accumulation - 0.5] * 2
    assert task.unread.tolist() == [0.5] * 2


def test_settings_that_deepspeed_refuses_late_are_a_mistake_too(processes):
    config = ClassifierConfig.model_validate(
        {
            "student": {"name": "x"},
            "loss": [{"name": "cross_entropy"}],
            "data": {"train": [{"path": "x"}]},
            "training": {"steps": 1, "batch_size": 1, "device": "cpu"},
            "deepspeed": {"stage": 1, "zero_optimization": {"compute_grad_norm": False}},
            "optimizer": {"max_grad_norm": 1.0},
            "output": "x",
        }
    )
    task = Task()
    with pytest.raises(
        UserError, match=r"deepspeed: DeepSpeed refuses this section: .*compute_grad_norm=false requires"
    ):
        Engine(task, torch.optim.SGD(task.parameters(), lr=1.0), config, processes)


def test_tied_weights_go_on_at_another_stage(processes, tmp_path):
    data, teacher = tiny.write_data(tmp_path / "data"), tiny.write_teacher(tmp_path / "teacher")

    def trained(name, stage, until=None):
        changes = {"student": tiny.settings(tied=True), "training__steps": 3, "deepspeed__stage": stage}
        changes["deepspeed__zero_optimization"] = {"stage3_param_persistence_threshold": 0}
        out = tmp_path / name
        Trainer(RunConfig.model_validate(tiny.config(out, data, teacher, **changes)), processes).run(until)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    straight = trained("straight", 2)
    trained("moved", 3, until=1)
    assert trained("moved", 2) == pytest.approx(straight, abs=1e-6)
