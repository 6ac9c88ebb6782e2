"""An exponential moving average of a student's weights, which is then the student that is evaluated and exported."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .classifier import Classifier

_FILE = "ema.safetensors"


class Average:
    """Float32 weights ``a ← d·a + (1 − d)·w`` after each optimizer step, and the student's batch-norm statistics too.

    In the first steps the decay is smaller, min(d, (1 + s)/(10 + s)) after s of them, so that the average is not one of
    untrained weights (as TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``).

    Args:
        student: whose weights are averaged; on its device already, not yet in an engine.
        decay: d.

    Attributes:
        model: a classifier with the averaged weights.
    """

    def __init__(self, student: Classifier, decay: float) -> None:
        self.model = copy.deepcopy(student).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Called after optimizer step ``step``, counted from 0."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        mine, now = self.model.state_dict(), student.state_dict()
        averaged = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[n] for n in averaged], [now[n].float() for n in averaged], weight)
        for name in mine.keys() - set(averaged):
            mine[name].copy_(now[name])

    def save(self, folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, folder / _FILE)

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / _FILE))
