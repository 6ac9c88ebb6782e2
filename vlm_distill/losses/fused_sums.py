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
        self.d_hidden = zero.new_zeros(student.hidden.shape) if wanted[0] else None
        self._d_weight = zero.new_empty(student.weight.shape) if wanted[1] else None
        self._weight_is_empty = True
        self.d_bias = zero.new_zeros(student.weight.shape[:1]) if wanted[2] else None

    @property
    def d_weight(self) -> Tensor | None:
        """The gradient by the head's weight so far, ``[V, H]``, at first 0; ``None`` if it is not wanted."""
        if self._d_weight is not None and self._weight_is_empty:
            self._d_weight.zero_()
            self._weight_is_empty = False
        return self._d_weight

    def add_weight_gradient(self, by_logits: Tensor, operands: Tensor) -> None:
        """Add a chunk's share of the gradient by the head's weight, if it is wanted.

        Args:
            by_logits: ``[n, V]``, the gradient by the chunk's logits.
            operands: ``[n, H]``, its hidden states.
        """
        if self._d_weight is None:
            return
        output = self.student.output
        if self._weight_is_empty:
            # The first product is written, which saves filling a matrix as large as the head and reading it.
            torch.mm(by_logits.t(), operands, **output, out=self._d_weight)
            self._weight_is_empty = False
        else:
            torch.addmm(self._d_weight, by_logits.t(), operands, **output, out=self._d_weight)

    def targets_at(self, positions: Tensor) -> Tensor | None:
        """Return the targets at some positions, if there are targets."""
        return None if self.targets is None else self.targets[positions]
