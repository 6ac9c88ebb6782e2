"""Divergences between the teacher's distribution p and the student's q, and the cross-entropy with the right tokens.

Each class has its definition in ``forward`` and the closed form of its gradient in ``rows``. Logits are divided by the
temperature T; there is no factor T². A logit of −∞ in both models puts a token outside the vocabulary: it adds nothing
and receives no gradient.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult, check_number, need_targets, relative_entropy_, softmax_, upcast


def kl_divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) over the last dimension, from log-probabilities; differentiable in both.

    Args:
        log_a: ``[N, V]``.
        log_b: ``[N, V]``.

    Returns:
        ``[N]`` nats. Tokens outside the support of a count 0.
    """
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


class _Tempered(DistillationLoss):
    """Logits divided by a temperature."""

    label: ClassVar[str]

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_number(f"loss {self.label}: temperature", temperature, 0.0, above=True)

    def _soften(self, student_logits: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        return upcast(student_logits) / self.temperature, upcast(teacher_logits) / self.temperature

    def _soften_(self, student_logits: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        if self.temperature != 1.0:
            student.div_(self.temperature)
            teacher.div_(self.temperature)
        return student, teacher

    def _chain_(self, grad: Tensor) -> Tensor:
        """From the derivative by the softened logits to that by the logits."""
        return grad.div_(self.temperature) if self.temperature != 1.0 else grad


class ForwardKL(_Tempered):
    """Forward KL, KL(p‖q): the student covers all that the teacher may say (Hinton et al., 2015)."""

    label = "forward_kl"
    scratch = 2

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        student, teacher = self._soften(student_logits, teacher_logits)
        return kl_divergence(teacher.log_softmax(-1), student.log_softmax(-1))

    @torch.no_grad()
    def rows(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        student, teacher = self._soften_(student_logits, teacher_logits)
        p, q = softmax_(teacher), softmax_(student)
        loss, _ = relative_entropy_(p, q)
        return RowResult(loss, self._chain_(q.probs.sub_(p.probs)) if grad else None)


class ReverseKL(_Tempered):
    """Reverse KL, KL(q‖p): the student keeps to what the teacher says most (Gu et al., 2024).

    Infinite where the student gives mass to a token that the teacher rules out.
    """

    label = "reverse_kl"
    scratch = 2

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        student, teacher = self._soften(student_logits, teacher_logits)
        return kl_divergence(student.log_softmax(-1), teacher.log_softmax(-1))

    @torch.no_grad()
    def rows(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        student, teacher = self._soften_(student_logits, teacher_logits)
        q, p = softmax_(student), softmax_(teacher)
        loss, summands = relative_entropy_(q, p)
        if not grad:
            return RowResult(loss)
        # d KL(q‖p) / d logits = q·(log q/p − KL)
        return RowResult(loss, self._chain_(summands.addcmul_(q.probs, loss.unsqueeze(-1), value=-1.0)))


class JSD(_Tempered):
    """Generalised Jensen-Shannon divergence, β KL(p‖m) + (1−β) KL(q‖m), m = β p + (1−β) q (Agarwal et al., 2024).

    ``beta`` weights the teacher; at 0 and at 1 the divergence is 0.
    """

    label = "jsd"
    scratch = 4

    def __init__(self, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        self.beta = check_number("loss jsd: beta", beta, 0.0, 1.0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        student, teacher = self._soften(student_logits, teacher_logits)
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        mixture = self.beta * log_p.exp() + (1.0 - self.beta) * log_q.exp()
        # Where the mixture underflows, both distributions are 0 in this precision and the summands are too.
        log_m = torch.where(mixture > 0, mixture, 1.0).log()
        return self.beta * kl_divergence(log_p, log_m) + (1.0 - self.beta) * kl_divergence(log_q, log_m)

    @torch.no_grad()
    def rows(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        student, teacher = self._soften_(student_logits, teacher_logits)
        p, q = softmax_(teacher), softmax_(student)
        limits = torch.finfo(student.dtype)
        # Finite logarithms, so that 0·log 0 is 0; a NaN passes through.
        log_m = (self.beta * p.probs).add_(q.probs, alpha=1.0 - self.beta).clamp_(min=limits.tiny).log_()
        p_part = p.log_probs.clamp_(min=limits.min).sub_(log_m).mul_(p.probs).sum(-1)
        q_summands = q.log_probs.clamp_(min=limits.min).sub_(log_m).mul_(q.probs)
        q_part = q_summands.sum(-1)
        loss = self.beta * p_part + (1.0 - self.beta) * q_part
        if not grad:
            return RowResult(loss)
        # (1−β) q·(log q/m − KL(q‖m)): the derivatives through m cancel.
        gradient = q_summands.addcmul_(q.probs, q_part.unsqueeze(-1), value=-1.0).mul_(1.0 - self.beta)
        return RowResult(loss, self._chain_(gradient))


class CrossEntropy(DistillationLoss):
    """Cross-entropy with the right tokens, −log q(target): learning from the data, without a teacher."""

    needs = frozenset({"targets"})
    scratch = 1

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        log_q = upcast(student_logits).log_softmax(-1)
        return -log_q.gather(-1, need_targets(targets).unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def rows(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        index = need_targets(targets).unsqueeze(-1)
        q = softmax_(upcast(student_logits))
        loss = -q.log_probs.gather(-1, index).squeeze(-1)
        if not grad:
            return RowResult(loss)
        return RowResult(loss, q.probs.scatter_add_(-1, index, q.probs.new_full(index.shape, -1.0)))
