"""timm's learning-rate schedules."""

from __future__ import annotations

import torch
from timm.scheduler import create_scheduler_v2
from torch import nn

from .config import OptimizerSection


class Schedule:
    """timm's schedule of a learning rate, as a function of the optimizer step."""

    def __init__(self, section: OptimizerSection, steps: int, epoch_steps: int) -> None:
        # timm's schedules write into an optimizer of their own.
        self._holder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=section.lr)
        # timm compares milestones with the next update: half an update later, they are exact.
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
