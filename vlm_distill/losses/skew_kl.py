"""Skew KL divergences: the second distribution is mixed with a share of the first (DistiLLM)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import DistillationLoss, Progress, RowResult
from .divergence import Divergence
from .kernels import Form, Kind
from .parameters import check_flag, check_number
from .softmax import Softmax, kl_divergence, kl_summands_, log_mixture, mixture, through_softmax_

# Limits of an adaptive α, and the decay of the running mean that it is compared with.
_LEAST_ALPHA, _GAP_MARGIN, _MEMORY = 0.01, 1e-5, 0.9


class _Skew(Divergence):
    """A KL divergence whose second distribution takes a share α of the first.

    With ``adaptive``, each answer has its own α (Ko et al., DistiLLM-2, 2025). Let d be the difference of both models'
    mean probabilities of the answer's tokens, exp(mean log p(y)) − exp(mean log q(y)) for the forward divergence and
    its negative for the reverse one. Then α = 1 − (1 − alpha)·d̄/(d + 10⁻⁵), between 0.01 and ``alpha``, with d̄ the
    running mean of d over the steps before. In the first step α is ``alpha``.
    """

    scratch = 4
    #: Sign of log p − log q for which an answer calls for more of the first distribution.
    sign: float

    def __init__(self, alpha: float, temperature: float, adaptive: bool) -> None:
        super().__init__(temperature)
        self.share = check_number(f"loss {self.label}: alpha", alpha, 0.0, 1.0, above=True)
        self.alpha: float | Tensor = self.share
        self.adapts = check_flag(f"loss {self.label}: adaptive", adaptive)
        self.takes_topk = self.takes_topk and not self.adapts
        self.signals = ("gap", "alpha") if self.adapts else ()
        self.gap: Tensor | None = None
        # A plain float and not a buffer: casting the module to bfloat16 would round a buffer.
        self._mean_gap: float | None = None

    def adapted(self, log_p: Tensor, log_q: Tensor, sequence_of: Tensor) -> DistillationLoss:
        gap = self.sign * (log_p.exp() - log_q.exp())
        alpha = torch.full_like(gap, self.share)
        if self._mean_gap is not None:
            alpha = 1.0 - (1.0 - self.share) * self._mean_gap / (gap + _GAP_MARGIN)
        loss = copy.copy(self)
        loss.gap, loss.alpha = gap[sequence_of], alpha.clamp(_LEAST_ALPHA, self.share)[sequence_of]
        return loss

    def at(self, positions: Tensor) -> DistillationLoss:
        if self.gap is None or not isinstance(self.alpha, Tensor):
            return self
        loss = copy.copy(self)
        loss.gap, loss.alpha = self.gap[positions], self.alpha[positions].unsqueeze(-1)
        return loss

    def kernel_form(self) -> Form | None:
        return None if self.adapts else super().kernel_form()

    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        result = super().loss_and_grad(student_logits, teacher_logits, targets, grad=grad)
        if self.gap is not None and isinstance(self.alpha, Tensor):
            result.signals = {"gap": self.gap, "alpha": self.alpha.squeeze(-1)}
        return result

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        gap = signals.get("gap", math.nan)
        if math.isfinite(gap):
            before = gap if self._mean_gap is None else self._mean_gap
            self._mean_gap = _MEMORY * before + (1.0 - _MEMORY) * gap

    def get_extra_state(self) -> dict[str, Any]:
        return {"mean_gap": self._mean_gap}

    def set_extra_state(self, state: Any) -> None:
        self._mean_gap = state["mean_gap"]


class SkewForwardKL(_Skew):
    """Skew forward KL, KL(p‖α p + (1−α) q) (Ko et al., DistiLLM, 2024); α near 0 is forward KL.

    Args:
        alpha: α, the teacher's share in the mixture.
        temperature: divides both models' logits.
        adaptive: whether each answer has its own α, up to ``alpha``.
    """

    label = "skew_forward_kl"
    kind = Kind.SKEW_FORWARD_KL
    sign = 1.0

    def __init__(self, alpha: float = 0.1, temperature: float = 1.0, adaptive: bool = False) -> None:
        super().__init__(alpha, temperature, adaptive)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_divergence(log_p, log_mixture(log_p, log_q, self.alpha))

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        m = mixture(p, q, self.alpha)
        loss = kl_summands_(p, m.log()).sum(-1)
        if not grad:
            return loss, None
        # −(1−α) p q/m; the ratio (1−α) q/m is at most 1.
        slope = torch.div(q.probs, m, out=m).mul_(p.probs).mul_(self.alpha - 1.0)
        return loss, through_softmax_(slope, q.probs)


class SkewReverseKL(_Skew):
    """Skew reverse KL, KL(q‖(1−α) p + α q) (Ko et al., DistiLLM, 2024); finite where the teacher rules a token out.

    Args:
        alpha: α, the student's share in the mixture.
        temperature: divides both models' logits.
        hold: whether the student inside the mixture is held fixed, as in DistiLLM-2 (Ko et al., 2025).
        adaptive: whether each answer has its own α, up to ``alpha``.
    """

    label = "skew_reverse_kl"
    kind = Kind.SKEW_REVERSE_KL
    sign = -1.0

    def __init__(
        self, alpha: float = 0.1, temperature: float = 1.0, hold: bool = False, adaptive: bool = False
    ) -> None:
        super().__init__(alpha, temperature, adaptive)
        self.hold = check_flag("loss skew_reverse_kl: hold", hold)

    def kernel_form(self) -> Form | None:
        form = super().kernel_form()
        return form._replace(kind=Kind.HELD_SKEW_REVERSE_KL) if form is not None and self.hold else form

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        own = log_q.detach() if self.hold else log_q
        return kl_divergence(log_q, log_mixture(log_p, own, 1.0 - self.alpha))

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        m = mixture(p, q, 1.0 - self.alpha)
        summands = kl_summands_(q, m.log())
        loss = summands.sum(-1)
        if not grad:
            return loss, None
        if self.hold:
            return loss, through_softmax_(summands, q.probs)
        # q·(log q/m − α q/m), without the q that the softmax cancels; the ratio α q/m is at most 1.
        ratio = torch.div(q.probs, m, out=m).mul_(self.alpha)
        return loss, through_softmax_(summands.addcmul_(ratio, q.probs, value=-1.0), q.probs)
