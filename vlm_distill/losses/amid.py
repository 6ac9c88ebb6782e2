"""AMiD: a divergence from, or to, a mean of both distributions (AMiD, ICLR 2026)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .divergence import Divergence
from .errors import LossError
from .parameters import check_choice, check_flag, check_number
from .softmax import Softmax, kl_divergence, through_softmax_

_ORDERS = ("pr", "qr", "rp", "rq")


class AMiD(Divergence):
    """KL between p or q and their α-mean r ∝ (λ p^c + (1−λ) q^c)^(1/c), c = (1−α)/2 (AMiD, 2026).

    At α = 1 the mean is that of the logits, r = softmax(λ·teacher + (1−λ)·student); at α = −1 that of the
    probabilities. ``pr`` at α = −1 is ``skew_forward_kl``, ``qr`` ``skew_reverse_kl``; ``rq`` with r held fixed is
    TAID's loss at t = λ.

    Args:
        alpha: α, from −10 to 10.
        mix: λ, the teacher's share, above 0 and below 1.
        order: ``pr`` for KL(p‖r), ``qr`` for KL(q‖r), ``rp`` for KL(r‖p), ``rq`` for KL(r‖q).
        hold: whether r is held fixed; only for ``qr`` and ``rq``, since the others reach the student through r alone.
        temperature: divides both models' logits.
    """

    label = "amid"
    scratch = 10

    def __init__(
        self, alpha: float = 0.5, mix: float = 0.5, order: str = "pr", hold: bool = False, temperature: float = 1.0
    ) -> None:
        super().__init__(temperature)
        self.alpha = check_number("loss amid: alpha", alpha, -10.0, 10.0)
        self.mix = check_number("loss amid: mix", mix, 0.0, 1.0, above=True)
        if self.mix == 1.0:
            raise LossError("loss amid: mix is 1, and r would be the teacher alone; give a number below 1")
        self.order = check_choice("loss amid: order", order, _ORDERS)
        self.hold = check_flag("loss amid: hold", hold)
        if self.hold and order in ("pr", "rp"):
            raise LossError(
                f"loss amid: with hold, order {order} has no gradient; give order qr or rq, or leave hold out"
            )
        self.power = (1.0 - self.alpha) / 2.0

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_r = self._log_mean(log_p, log_q.detach() if self.hold else log_q).log_softmax(-1)
        by_name = {"p": log_p, "q": log_q, "r": log_r}
        first, second = (by_name[name] for name in self.order)
        return kl_divergence(first, second)

    def _log_mean(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Compute log r ``[N, V]`` up to a constant of each row: the larger logarithm plus what its share takes off."""
        outside = (log_p == -torch.inf) & (log_q == -torch.inf)
        gap = torch.where(outside, 0.0, log_q) - torch.where(outside, 0.0, log_p)
        smaller = torch.where(gap > 0, gap.new_tensor(self.mix), gap.new_tensor(1.0 - self.mix))
        if self.power == 0.0:
            less = -smaller * gap.abs()
        else:
            less = torch.log1p(smaller * torch.expm1(-self.power * gap.abs())) / self.power
        return torch.where(gap > 0, log_q, log_p) + less

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        log_r = self._log_mean(p.log_probs, q.log_probs).log_softmax(-1)
        by_name = {"p": p.log_probs, "q": q.log_probs, "r": log_r}
        first, second = (by_name[name] for name in self.order)
        loss = kl_divergence(first, second)
        if not grad:
            return loss, None
        r = log_r.exp()
        # q·(derivative by q with r fixed), without what the softmax cancels
        if self.order == "qr":
            direct = _product(q.probs, q.log_probs, log_r)
        else:
            direct = -r if self.order == "rq" else torch.zeros_like(r)
        if not self.hold:
            direct += self._through_mean(p, q, log_r, r)
        return loss, through_softmax_(direct, q.probs)

    def _through_mean(self, p: Softmax, q: Softmax, log_r: Tensor, r: Tensor) -> Tensor:
        """Compute q·(derivative by q through r): the derivative by log r, normalised, times q's share of the mean."""
        if self.order in ("pr", "qr"):
            by_mean = r - (p if self.order == "pr" else q).probs
        else:
            by_mean = through_softmax_(_product(r, log_r, (p if self.order == "rp" else q).log_probs), r)
        if self.power == 0.0:
            return by_mean.mul_(1.0 - self.mix)
        gap = self.power * (p.log_probs - q.log_probs) + math.log(self.mix / (1.0 - self.mix))
        # Outside the vocabulary the gap is NaN, and the derivative 0.
        return torch.where(by_mean == 0, 0.0, by_mean * torch.sigmoid(-gap))


def _product(weights: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Compute weights·(log a − log b); 0 at weight 0."""
    return torch.where(weights == 0, 0.0, weights * (log_a - log_b))
