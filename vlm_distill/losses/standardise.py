"""Logit standardisation: any loss on logits, after bringing both models' rows to mean 0 and deviation 1."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .base import DistillationLoss, Progress, RowResult
from .errors import LossError
from .softmax import upcast

# Added to the deviation in the authors' code.
_EPS = 1e-7


def standardised(logits: Tensor) -> Tensor:
    """Compute (z − mean)/(deviation + 1e-7) of each row of ``[N, V]``, V − 1 under the root; differentiable.

    As in the authors' code (Sun et al., CVPR 2024). Undefined for −∞.
    """
    deviation = logits.std(-1, keepdim=True)
    return (logits - logits.mean(-1, keepdim=True)) / (deviation + _EPS)


class Standardised(DistillationLoss):
    """A loss on standardised logits (Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024).

    The student then has to match how its teacher's logits relate, not how large they are: each row gets a temperature
    proportional to the spread of its logits. The gradient flows through the student's mean and deviation.

    Args:
        inner: the loss; its temperature divides the standardised logits.
    """

    def __init__(self, inner: DistillationLoss) -> None:
        super().__init__()
        if inner.adapts:
            raise LossError("standardise: a loss with adaptive compares the models' own probabilities; leave one out")
        self.inner = inner
        self.needs = inner.needs
        self.signals = inner.signals
        self.scratch = inner.scratch + 1

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        return self.inner(standardised(upcast(student_logits)), standardised(upcast(teacher_logits)), targets)

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        z, teacher = upcast(student_logits), upcast(teacher_logits)
        _standardise_in_place(teacher)
        deviation = _standardise_in_place(z)
        # The inner loss may overwrite its arguments.
        result = self.inner.loss_and_grad(z.clone() if grad else z, teacher, targets, grad=grad)
        if result.grad is None:
            return result
        # With s the deviation, z' = (x − mean)/s and g the gradient by z: (g − mean g − z'·Σ g·z/(V − 1))/(s + ε).
        # In a row of equal logits no direction increases the deviation: z is 0 there, and z' is set to 0.
        along = result.grad.mul(z).sum(-1, keepdim=True) / (z.shape[-1] - 1)
        stretch = torch.where(deviation > 0, (deviation + _EPS) / deviation, 0.0)
        gradient = result.grad.sub_(result.grad.mean(-1, keepdim=True))
        gradient.sub_(z.mul_(along.mul_(stretch))).div_(deviation + _EPS)
        return RowResult(result.loss, gradient, result.signals, result.learned)

    def prepare(self, categories: int) -> None:
        self.inner.prepare(categories)

    def learned_tensors(self) -> tuple[Tensor, ...]:
        return self.inner.learned_tensors()

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        self.inner.update(signals, progress)

    def metrics(self) -> dict[str, float]:
        return self.inner.metrics()


def _standardise_in_place(logits: Tensor) -> Tensor:
    """Compute ``standardised`` in the logits' memory; return the rows' deviation ``[N, 1]``."""
    logits.sub_(logits.mean(-1, keepdim=True))
    # On a CPU several times as fast as `std`.
    deviation = vector_norm(logits, dim=-1, keepdim=True).div_(math.sqrt(logits.shape[-1] - 1))
    logits.div_(deviation + _EPS)
    return deviation
