"""ALM: compares the probabilities that both models give to the same text, whatever tokens they write it in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult
from .groups import TokenGroups, sum_groups
from .parameters import check_choice, check_number
from .softmax import at_targets, need_targets, softmax_, upcast

DISTANCES = ("binary_cross_entropy", "reverse_binary_kl", "absolute")
# Keeps probabilities below 1, so that log(1 − p) and its derivative are finite.
_MARGIN = 1e-6


class ALM(DistillationLoss):
    """Approximate likelihood matching of runs of tokens that spell the same text (Minixhofer et al., 2025).

    With X the log-probability of a group's text, the sum over the group's own tokens, a model gives the event "this
    text follows" the probability eˣ, x = min(X, 0)/τ − 10⁻⁶. The two binary distributions are compared. Tokens that are
    in no group add nothing. The probability that the text ends at a token boundary there is not part of X: a teacher
    that is read from a cache or a server knows the answer's own tokens only.

    ``binary_cross_entropy`` is −[e^{xₜ} xₛ + (1 − e^{xₜ}) log(1 − e^{xₛ})]; its gradient shrinks as 1/τ. With τ = ∞,
    x = min(X, 0) − 10⁻⁶ and the loss is the limit of τ times the binary KL, (xₜ − xₛ) + xₜ log(xₛ/xₜ).

    Args:
        tau: τ, the temperature of the binary distributions; with ``inf`` the limit.
        distance: ``binary_cross_entropy``; ``reverse_binary_kl``, KL(student‖teacher); ``absolute``, |e^{xₜ} − e^{xₛ}|.
    """

    takes_groups = True
    takes_tokens = True
    scratch = 2

    def __init__(self, tau: Any = 100.0, distance: str = "binary_cross_entropy") -> None:
        super().__init__()
        self.distance = check_choice("loss alm: distance", distance, DISTANCES)
        infinite = tau == math.inf and self.distance == "binary_cross_entropy"
        self.tau = math.inf if infinite else check_number("loss alm: tau", tau, 0.0, above=True)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Compute the distance ``[G]`` from log-probabilities ``[G]`` of texts; differentiable in both."""
        if self.tau == math.inf:
            t, s = teacher.clamp(max=0.0) - _MARGIN, student.clamp(max=0.0) - _MARGIN
            return (t - s) + t * torch.log(-s) - t * torch.log(-t)
        t = teacher.clamp(max=0.0) / self.tau - _MARGIN
        s = student.clamp(max=0.0) / self.tau - _MARGIN
        p, q = t.exp(), s.exp()
        if self.distance == "absolute":
            return (p - q).abs()
        log_not_q = torch.log(-torch.expm1(s))
        if self.distance == "reverse_binary_kl":
            return q * (s - t) + (1.0 - q) * (log_not_q - torch.log(-torch.expm1(t)))
        return -(p * s + (1.0 - p) * log_not_q)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        targets: Tensor | None = None,
        groups: TokenGroups | None = None,
    ) -> Tensor:
        """Compute the loss of each row or group; differentiable by autograd.

        Args:
            student_logits: ``[N, V]``.
            teacher_logits: ``[N, V']``; ``[M, V']`` with groups.
            targets: int64 ``[N]``, the student's right tokens; without groups also the teacher's.
            groups: over the N and M rows; without them every token is a group.

        Returns:
            ``[N]``; ``[G]`` with groups.
        """
        targets = need_targets(targets)
        student = _own_tokens(upcast(student_logits), targets)
        teacher = _own_tokens(upcast(teacher_logits), targets if groups is None else groups.teacher_targets)
        if groups is not None:
            student, teacher = sum_groups(student, groups.student), sum_groups(teacher, groups.teacher)
        return self.compare(teacher, student)

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        targets = need_targets(targets)
        teacher = _own_tokens(upcast(teacher_logits), targets)
        return self.token_loss_and_grad(student_logits, teacher, targets, None, grad=grad)

    @torch.no_grad()
    def grouped_loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, groups: TokenGroups, *, grad: bool
    ) -> RowResult:
        teacher = _own_tokens(upcast(teacher_logits), groups.teacher_targets)
        return self.token_loss_and_grad(student_logits, teacher, targets, groups, grad=grad)

    @torch.no_grad()
    def token_loss_and_grad(
        self,
        student_logits: Tensor,
        teacher_log_probs: Tensor,
        targets: Tensor,
        groups: TokenGroups | None,
        *,
        grad: bool,
    ) -> RowResult:
        log_q, q, _ = softmax_(upcast(student_logits))
        index = targets.unsqueeze(-1)
        student, teacher = log_q.gather(-1, index).squeeze(-1), teacher_log_probs.to(log_q.dtype)
        with torch.enable_grad():
            leaf = student.requires_grad_(grad)
            texts = leaf if groups is None else sum_groups(leaf, groups.student)
            other = teacher if groups is None else sum_groups(teacher, groups.teacher)
            loss = self.compare(other, texts)
            slope = torch.autograd.grad(loss.sum(), leaf)[0].unsqueeze(-1) if grad else None
        if slope is None:
            return RowResult(loss.detach())
        # The derivative of a token's log-probability by the logits is onehot − q.
        return RowResult(loss.detach(), q.mul_(-slope).scatter_add_(-1, index, slope))


def _own_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the log-probability ``[N]`` of each row's target; differentiable."""
    return at_targets(logits.log_softmax(-1), targets)
