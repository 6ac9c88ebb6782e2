"""A teacher made of the student: a copy of it, as it started or as a moving average of its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.errors import UserError

from .interface import VisionLanguageModel
from .teacher import ModelTeacher

_FILE = "teacher_average.safetensors"


class SelfTeacher(ModelTeacher):
    """A copy of the student, whole on every rank: as the student started, or following it.

    Args:
        student: with its trained parts marked, before an engine has sharded it.
        dtype, device: of the copy.
        ema: d; after each update the average e of every trained weight w becomes d · e + (1 − d) · w (Tarvainen &
            Valpola 2017). ``None``: the copy never changes.

    Raises:
        UserError: the student has batch norm, whose running statistics each rank has for itself.
    """

    def __init__(
        self, student: VisionLanguageModel, dtype: torch.dtype, device: torch.device, ema: float | None = None
    ) -> None:
        if ema is not None and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules()):
            raise UserError("teacher.ema: the student has batch norm, whose statistics are not averaged; leave ema out")
        model = copy.deepcopy(student, {id(student.processor): student.processor})
        super().__init__(model.to(device, dtype))
        self.ema = ema
        #: Averages in float32 by name; in float32 they are the copy's own weights.
        self.averages: dict[str, Tensor] = {}
        if ema is not None:
            for (name, own), weight in zip(model.named_parameters(), student.parameters(), strict=True):
                if weight.requires_grad:
                    exact = dtype == torch.float32
                    self.averages[name] = own.detach() if exact else weight.detach().to(device, torch.float32)

    @property
    def bytes_beside(self) -> int:  # type: ignore[override]
        return sum(average.nbytes for average in self.averages.values()) if self.model.dtype != torch.float32 else 0

    @torch.no_grad()
    def follow(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.ema is None:
            return
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            average = self.averages[name].mul_(self.ema).add_(weight, alpha=1 - self.ema)
            own[name].copy_(average)

    def save_state(self, folder: Path) -> None:
        if self.averages:
            save_file({name: average.cpu() for name, average in self.averages.items()}, folder / _FILE)

    @torch.no_grad()
    def load_state(self, folder: Path) -> None:
        if not self.averages:
            return
        path = folder / _FILE
        if not path.is_file():
            raise UserError(f"{folder} was written by a run without teacher.ema; choose another output")
        own = dict(self.model.named_parameters())
        for name, average in load_file(path).items():
            own[name].copy_(self.averages[name].copy_(average))
