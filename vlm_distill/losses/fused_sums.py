"""What one call of ``fused_linear`` adds up: the sums of the terms, and the gradients of the student's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import Term
from .heads import ModelSide
from .sums import Sums
from .token_targets import TokenTargets
from .topk import TopKTargets


class FusedSums(Sums):
    """The sums of every term, and the gradients by hidden states, head weight and head bias.

    Args:
        terms: the summands.
        scales: a factor for each term's sum, by name; 1 for the others.
        student: its hidden states and head.
        teacher: the same of the teacher, its likeliest tokens, its log-probabilities of the answers, or ``None``.
        targets: int64 ``[N]``, or ``None`` if no term reads them.
        wanted: which inputs need a gradient: hidden states, weight, bias, then whatever the losses learn.
        chunk_bytes: limit of the buffers as the caller gave it; chunks and tiles have defaults of their own.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        scales: Mapping[str, float],
        student: ModelSide,
        teacher: ModelSide | TopKTargets | TokenTargets | None,
        targets: Tensor | None,
        wanted: Sequence[bool],
        chunk_bytes: int | None,
    ) -> None:
        zero = torch.zeros((), dtype=student.dtype, device=student.hidden.device)
        super().__init__(terms, scales, zero, grad=any(wanted))
        self.student, self.teacher, self.targets = student, teacher, targets
        self.chunk_bytes = chunk_bytes
        self.on_cpu = zero.device.type == "cpu"
        shapes = (student.hidden.shape, student.weight.shape, student.weight.shape[:1])
        self.gradients = [
            zero.new_zeros(shape) if want else None for shape, want in zip(shapes, wanted[:3], strict=True)
        ]

    def targets_at(self, positions: Tensor) -> Tensor | None:
        """Return the targets at some positions, if there are targets."""
        return None if self.targets is None else self.targets[positions]
