"""Skew KL divergences: the second distribution is mixed with a share of the first (DistiLLM)."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import Divergence
from .kernels import Form, Kind
from .parameters import check_flag, check_number
from .softmax import Softmax, kl_divergence, kl_summands_, log_mixture, mixture, through_softmax_


class _Skew(Divergence):
    """A KL divergence whose second distribution takes a share ``alpha`` of the first."""

    scratch = 4

    def __init__(self, alpha: float = 0.1, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        self.alpha = self.share = check_number(f"loss {self.label}: alpha", alpha, 0.0, 1.0, above=True)


class SkewForwardKL(_Skew):
    """Skew forward KL, KL(p‖α p + (1−α) q) (Ko et al., DistiLLM, 2024); α near 0 is forward KL.

    Args:
        alpha: α, the teacher's share in the mixture.
        temperature: divides both models' logits.
    """

    label = "skew_forward_kl"
    kind = Kind.SKEW_FORWARD_KL

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
    """

    label = "skew_reverse_kl"
    kind = Kind.SKEW_REVERSE_KL

    def __init__(self, alpha: float = 0.1, temperature: float = 1.0, hold: bool = False) -> None:
        super().__init__(alpha, temperature)
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
        ratio = torch.div(q.probs, m, out=m)
        return loss, through_softmax_(summands.addcmul_(ratio, q.probs, value=-self.alpha), q.probs)
