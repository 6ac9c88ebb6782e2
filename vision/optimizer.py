"""timm's optimizers and learning-rate schedules, as a configuration names them and ZeRO allows them."""

from __future__ import annotations

from typing import Any

import timm.optim
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from data.errors import UserError
from vlm_distill.training.schedule import parameter_groups

from .config import OptimizerSection
from .task import ClassificationTask

# timm's optimizers whose update of a number reads that number's own gradient and state alone. ZeRO 1 to 3 hands the
# optimizer flat slices of all parameters, so that any other would see layers that are none.
_ELEMENTWISE = {
    *("sgd", "momentum", "nesterov", "nesterovw", "sgdw", "adam", "adamw", "adamax", "adagrad", "adadelta", "nadam"),
    *("nadamw", "radam", "radamw", "rmsprop", "rmsproptf", "lion", "adan", "adanw", "adopt", "adoptw", "laprop"),
    "madgrad",
}


def build_optimizer(task: ClassificationTask, section: OptimizerSection, stage: int) -> torch.optim.Optimizer:
    """timm's optimizer of that name, over the student's parameters and what the losses learn.

    Raises:
        UserError: there is none of that name, it cannot work on what ZeRO gives it, or an option is unknown.
    """
    if section.name not in timm.optim.list_optimizers():
        raise UserError(f"optimizer.name: timm has no {section.name}; for example sgd, momentum, adamw, lamb")
    if stage and section.name not in _ELEMENTWISE:
        raise UserError(
            f"optimizer.name: {section.name} looks at whole layers (or may), which ZeRO {stage} cuts up; set "
            f"deepspeed.stage to 0, or choose one of {', '.join(sorted(_ELEMENTWISE))}"
        )
    student: Any = task.student.model
    exempt = student.no_weight_decay() if hasattr(student, "no_weight_decay") else ()
    decay = section.weight_decay
    learned = parameter_groups(task.losses, decay)
    groups: list[dict[str, Any]]
    if section.layer_decay is not None:
        try:
            groups = param_groups_layer_decay(
                student, decay, no_weight_decay_list=exempt, layer_decay=section.layer_decay
            )
        except (AttributeError, AssertionError):
            raise UserError(
                f"optimizer.layer_decay: timm knows no layers of {type(student).__name__}; leave it out"
            ) from None
    elif section.decay == "all":
        groups = [{"params": [p for p in student.parameters() if p.requires_grad], "weight_decay": decay}]
        learned = [{**group, "weight_decay": decay} for group in learned]
    else:
        groups = param_groups_weight_decay(student, decay, no_weight_decay_list=exempt)
    groups += learned
    try:
        return timm.optim.create_optimizer_v2(
            [group for group in groups if group["params"]],
            section.name,
            lr=section.lr,
            weight_decay=decay,
            momentum=section.momentum,
            **section.options,
        )
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        raise UserError(f"optimizer: {section.name}: {' '.join(str(error).split())}") from None


class Schedule:
    """timm's schedule of a learning rate, as a function of the optimizer step."""

    def __init__(self, section: OptimizerSection, steps: int, epoch_steps: int) -> None:
        # timm's schedules write into an optimizer; the engine's is not theirs.
        self._holder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=section.lr)
        # timm compares them with the update after this one: half an update later, they are exact.
        milestones = [(round(epoch * epoch_steps) + 0.5) / epoch_steps for epoch in section.milestones]
        self._schedule, _ = create_scheduler_v2(
            self._holder,
            section.schedule,
            num_epochs=steps / epoch_steps,  # type: ignore[arg-type]  # a fraction will do
            decay_epochs=section.decay_epochs,
            decay_milestones=milestones,  # type: ignore[arg-type]
            decay_rate=section.decay_rate,
            min_lr=section.min_lr,
            warmup_lr=section.warmup_lr,
            warmup_epochs=section.warmup_epochs,  # type: ignore[arg-type]
            step_on_epochs=False,
            updates_per_epoch=epoch_steps,
        )

    def __call__(self, step: int) -> float:
        self._schedule.step_update(step)
        return self._holder.param_groups[0]["lr"]
