"""Learning rates of single parts, from the configuration to the weights."""

import pytest
import tiny
from pydantic import ValidationError

from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.trainer import Trainer

RATES = {"vision_encoder": 1e-5, "projector": 1e-3}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("part_lr")
    return folder, tiny.write_data(folder / "data", 8), tiny.write_teacher(folder / "teacher")


def settings(material, name, **changes):
    folder, data, teacher = material
    optimizer = {"lr": 1e-4, "part_lr": RATES, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": None}
    changes = {"optimizer": optimizer, "training__steps": 1} | changes
    return RunConfig.model_validate(tiny.config(folder / name, data, teacher, **changes))


@pytest.mark.parametrize("stage", [0, 2])
def test_each_part_moves_by_its_own_rate(material, processes, stage):
    """AdamW's first step is the learning rate wherever a gradient is well above epsilon."""
    trainer = Trainer(settings(material, f"stage{stage}", deepspeed={"stage": stage}), processes)
    before = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    parts = {id(p): part for part, module in trainer.student.parts.items() for p in module.parameters()}
    trainer.run(until=1)
    moved = dict.fromkeys(trainer.student.parts, 0.0)
    for name, parameter in trainer.student.named_parameters():
        part = parts[id(parameter)]
        moved[part] = max(moved[part], (parameter.detach() - before[name]).abs().max().item())
    assert moved == pytest.approx(RATES | {"decoder": 1e-4}, rel=0.02)


def test_a_part_that_does_not_train_is_refused(material, processes):
    student = tiny.settings() | {"train": ["projector"]}
    with pytest.raises(UserError, match=r"^optimizer.part_lr: the vision_encoder does not train"):
        Trainer(settings(material, "frozen", student=student), processes)


def test_a_name_that_is_no_part_is_refused(material):
    with pytest.raises(ValidationError, match="vision_encoder"):
        settings(material, "unknown", optimizer={"part_lr": {"vision": 1e-6}})
