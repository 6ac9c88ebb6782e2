"""TAID: a target that moves from the student's own distribution to the teacher's (Shing et al., ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError

from .base import DistillationLoss, Progress, RowResult, check_number, relative_entropy_, softmax_, upcast
from .divergences import kl_divergence

SCHEDULES = ("paper", "linear")


class TAID(DistillationLoss):
    """KL(p_t‖q) with p_t = softmax((1−t)·student, detached, + t·teacher); t grows over training (Shing et al., 2025).

    The gradient by the student's logits is q − p_t. The schedule moves t once after every optimizer step:

    - ``paper``: the released rule. With J the mean cross-entropy of p_t and q over the step and n the steps done,
      δ = (J' − J)/(J' + 1e-15) against the step before, m = beta·m + (1−beta)·δ, and
      t = min(t_end, max(line, t + alpha·sigmoid(m)·(1−t))), line = t_start + (t_end − t_start)·n/steps.
      A non-finite J leaves J' and m alone, and t follows max(line, t). t never falls.
    - ``linear``: the line alone.

    Evaluation does not move t: only ``update`` does.
    """

    signals = ("kl", "cross_entropy")
    scratch = 4

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        schedule: str = "paper",
    ) -> None:
        super().__init__()
        self.t_start = check_number("loss taid: t_start", t_start, 0.0, 1.0)
        self.t_end = check_number("loss taid: t_end", t_end, 0.0, 1.0)
        if self.t_end < self.t_start:
            raise UserError(f"loss taid: t_end = {t_end} lies below t_start = {t_start}; t must not fall")
        self.alpha = check_number("loss taid: alpha", alpha, 0.0)
        self.beta = check_number("loss taid: beta", beta, 0.0, 1.0)
        if schedule not in SCHEDULES:
            raise UserError(f"loss taid: schedule = {schedule!r}; it must be one of {', '.join(SCHEDULES)}")
        self.schedule = schedule
        # Plain floats and not buffers: casting the module to bfloat16 would round a buffer.
        self._t = self.t_start
        self._momentum = 0.0
        self._previous = math.inf

    @property
    def t(self) -> float:
        """The share of the teacher in the target, 0 to 1."""
        return self._t

    @t.setter
    def t(self, value: float) -> None:
        self._t = check_number("loss taid: t", value, 0.0, 1.0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        # 0·∞ counts as 0: a share of nothing leaves the other model's logits as they are.
        if self._t == 0.0:
            mixed = student.detach()
        elif self._t == 1.0:
            mixed = teacher
        else:
            mixed = (1.0 - self._t) * student.detach() + self._t * teacher
        return kl_divergence(mixed.log_softmax(-1), student.log_softmax(-1))

    @torch.no_grad()
    def rows(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        student, mixed = upcast(student_logits), upcast(teacher_logits)
        if self._t == 0.0:
            mixed.copy_(student)
        elif self._t < 1.0:
            mixed.mul_(self._t).add_(student, alpha=1.0 - self._t)
        p, q = softmax_(mixed), softmax_(student)
        # The lower limit makes 0·log 0 = 0.
        entropy = -p.log_probs.clamp(min=torch.finfo(mixed.dtype).min).mul_(p.probs).sum(-1)
        kl, _ = relative_entropy_(p, q)
        signals = {"kl": kl, "cross_entropy": kl + entropy}
        return RowResult(kl, q.probs.sub_(p.probs) if grad else None, signals)

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        line = self.t_start + (self.t_end - self.t_start) * progress.step / max(progress.steps, 1)
        proposed = line
        if self.schedule == "paper":
            loss = float(signals.get("cross_entropy", math.nan))
            if math.isfinite(loss):
                if math.isfinite(self._previous):
                    change = (self._previous - loss) / (self._previous + 1e-15)
                    self._momentum = self.beta * self._momentum + (1.0 - self.beta) * change
                    proposed = max(line, self._t + self.alpha * _sigmoid(self._momentum) * (1.0 - self._t))
                self._previous = loss
        self._t = max(self._t, min(self.t_end, proposed))

    def metrics(self) -> dict[str, float]:
        return {"t": self._t}

    def get_extra_state(self) -> dict[str, float]:
        return {"t": self._t, "momentum": self._momentum, "previous": self._previous}

    def set_extra_state(self, state: Any) -> None:
        self._t, self._momentum, self._previous = (float(state[k]) for k in ("t", "momentum", "previous"))


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))  # never overflows
    return 1.0 / (1.0 + small) if x >= 0 else small / (1.0 + small)
