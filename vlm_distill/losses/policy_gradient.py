"""Reverse KL estimated at the drawn tokens alone, as a policy gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import DistillationLoss, Progress, RowResult
from .groups import TokenGroups
from .parameters import check_number
from .softmax import at_targets, need_targets, softmax_, upcast


class PolicyGradient(DistillationLoss):
    """Reverse KL estimated from the student's own answers, for teachers that give one log-probability a token.

    With d = log q(y) − log p(y) at a token y that the student q drew, −d is the token's advantage: the gradient is
    d ∇log q(y), which on average over y is the gradient of KL(q‖p), as Σ q ∇log q = 0. The loss that is reported is
    k1 = d, whose average is KL(q‖p) itself. Logged beside it, as means over a step: ``k2`` = d²/2, which is biased and
    varies less, and ``k3`` = e^{−d} − 1 + d, which is not biased and never negative (J. Schulman, "Approximating KL
    divergence", 2020).

    Args:
        clip: the largest |d| in the gradient; ``None``: no limit. A limit biases it.
    """

    takes_tokens = True
    on_drawn_only = True
    signals = ("k2", "k3")
    scratch = 2

    def __init__(self, clip: Any = None) -> None:
        super().__init__()
        self.clip = None if clip is None else check_number("loss policy_gradient: clip", clip, 0.0, above=True)
        self._last: dict[str, float] = {}

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        self._last = dict(signals)

    def metrics(self) -> dict[str, float]:
        return dict(self._last)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        """Compute d of each row; its derivative is that of (d, held fixed) · log q(y)."""
        targets = need_targets(targets)
        student = at_targets(upcast(student_logits).log_softmax(-1), targets)
        teacher = at_targets(upcast(teacher_logits).log_softmax(-1), targets)
        distance = (student - teacher).detach()
        return distance + self._slope(distance) * (student - student.detach())

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        targets = need_targets(targets)
        teacher = at_targets(softmax_(upcast(teacher_logits)).log_probs, targets)
        return self.token_loss_and_grad(student_logits, teacher, targets, None, grad=grad)

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
        assert groups is None, "tokens of another vocabulary have no probability here"
        log_q, q, _ = softmax_(upcast(student_logits))
        distance = at_targets(log_q, targets) - teacher_log_probs.to(log_q.dtype)
        signals = {"k2": distance.square() / 2, "k3": torch.expm1(-distance) + distance}
        if not grad:
            return RowResult(distance, None, signals)
        # The derivative of log q(y) by the logits is onehot − q.
        slope = self._slope(distance).unsqueeze(-1)
        return RowResult(distance, q.mul_(-slope).scatter_add_(-1, targets.unsqueeze(-1), slope), signals)

    def _slope(self, distance: Tensor) -> Tensor:
        return distance if self.clip is None else distance.clamp(-self.clip, self.clip)
