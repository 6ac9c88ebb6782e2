"""Curriculum temperature: KD at a temperature that learns against the student."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import DistillationLoss, Progress, RowResult, check_number, relative_entropy_, softmax_, upcast
from .divergences import kl_divergence


class CTKD(DistillationLoss):
    """Curriculum temperature KD, T²·KL(p‖q), T = t_start + t_range·sigmoid(g), g learnt to raise it (Li et al., 2023).

    g's gradient is multiplied by a negative coefficient, so that the optimizer that lowers the loss by the student's
    weights raises it by g: the task grows harder as the coefficient goes from 0 to −1. There is one g for all tokens.

    Args:
        t_start: the least temperature.
        t_range: the span above it.
        g: where g starts; 1 in the authors' code.
        loops: epochs, fractions included, in which the coefficient goes from 0 to −1 by half a cosine.
        grl_coefficient: a coefficient that stays, in place of ``loops``.
    """

    needs = frozenset({"teacher"})
    scratch = 4

    def __init__(
        self,
        t_start: float = 1.0,
        t_range: float = 20.0,
        g: float = 1.0,
        loops: float = 10.0,
        grl_coefficient: float | None = None,
    ) -> None:
        super().__init__()
        self.loops = check_number("loss ctkd: loops", loops, 0.0, above=True)
        self._fixed = grl_coefficient is not None
        self.coefficient = 0.0
        if grl_coefficient is not None:
            self.coefficient = check_number("loss ctkd: grl_coefficient", grl_coefficient, -math.inf)
        self.temperature = _Temperature(
            check_number("loss ctkd: t_start", t_start, 0.0, above=True),
            check_number("loss ctkd: t_range", t_range, 0.0),
            check_number("loss ctkd: g", g, -math.inf),
        )
        self._held: Tensor | None = None

    def learned(self) -> Tensor:
        value = self.temperature(self.coefficient)
        self._held = value.detach()
        return value

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        temperature = self.learned().to(upcast(student_logits).dtype)
        student, teacher = upcast(student_logits) / temperature, upcast(teacher_logits) / temperature
        return temperature**2 * kl_divergence(teacher.log_softmax(-1), student.log_softmax(-1))

    @torch.no_grad()
    def rows(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        held = self.learned().detach() if self._held is None else self._held
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        temperature = held.to(student.dtype)
        p, q = softmax_(teacher.div_(temperature)), softmax_(student.div_(temperature))
        if not grad:
            return RowResult(temperature**2 * relative_entropy_(p, q)[0])
        # The lower limit makes 0·log 0 = 0. Softened logits and log-probabilities differ by a constant, over which the
        # weights below sum to 0.
        least = torch.finfo(student.dtype).min
        log_p, log_q = p.log_probs.clamp(min=least), q.log_probs.clamp(min=least)
        kl, summands = relative_entropy_(p, q)
        weights = summands.addcmul_(p.probs, kl.unsqueeze(-1), value=-1.0)
        gap = q.probs.sub_(p.probs)
        # T·dKL/dT = −Σ (q−p) log q − Σ p (log p/q − KL) log p
        slope = -(log_q.mul_(gap).sum(-1) + log_p.mul_(weights).sum(-1))
        learned = temperature * (2.0 * kl + slope)
        return RowResult(temperature**2 * kl, gap.mul_(temperature), learned=learned)

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        if not self._fixed:
            done = min(progress.epoch / self.loops, 1.0)
            self.coefficient = -(1.0 - math.cos(math.pi * done)) / 2.0

    def metrics(self) -> dict[str, float]:
        held = {} if self._held is None else {"temperature": float(self._held)}
        return held | {"coefficient": self.coefficient}

    def get_extra_state(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def set_extra_state(self, state: Any) -> None:
        self.coefficient = float(state["coefficient"])


class _Temperature(nn.Module):
    """A module of its own: where parameters are sharded, its call is what makes g whole."""

    def __init__(self, start: float, span: float, g: float) -> None:
        super().__init__()
        self.start, self.span = start, span
        # Not 0-dimensional, which DeepSpeed refuses.
        self.g = nn.Parameter(torch.tensor([g]))

    def forward(self, coefficient: float) -> Tensor:
        """T ``[1]``, whose derivative by g is multiplied by ``coefficient``."""
        held = self.g.detach()
        return self.start + self.span * torch.sigmoid(held + coefficient * (self.g - held))
