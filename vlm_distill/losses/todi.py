"""ToDi: forward and reverse KL, weighed token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .divergence import Divergence
from .kernels import Kind
from .softmax import Softmax, through_softmax_


class ToDi(Divergence):
    """Token-wise divergence, Σ s p log(p/q) + (1−s) q log(q/p), s = p/(p+q) held fixed (Jung et al., 2025).

    Forward KL raises the tokens that the student underrates, and reverse KL lowers those that it overrates. Infinite if
    one model rules out a token to which the other gives mass.

    Args:
        temperature: divides both models' logits.
    """

    label = "todi"
    kind = Kind.TODI
    scratch = 3

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        outside = (log_p == -torch.inf) & (log_q == -torch.inf)
        gap = torch.where(outside, 0.0, log_q) - torch.where(outside, 0.0, log_p)
        share = torch.sigmoid(-gap.detach())
        weight = (1.0 - share) * log_q.exp() - share * log_p.exp()
        return torch.where(weight == 0, 0.0, weight * gap).sum(-1)

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        # nan_to_num replaces ∞ − ∞ and 0·∞, but also hides a NaN among the logits: log_total brings it back.
        gap = q.log_probs.sub_(p.log_probs).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        difference = torch.sub(q.probs, p.probs, out=p.probs)
        # With s = p/(p+q), the value is Σ (q−p) log(q/p).
        summands = (difference * gap).nan_to_num_(nan=0.0, posinf=math.inf)
        loss = summands.sum(-1) + 0.0 * (p.log_total + q.log_total).squeeze(-1)
        if not grad:
            return loss, None
        # −s p + (1−s) q (log(q/p) + 1)
        slope = torch.sigmoid(gap, out=summands).mul_(q.probs).mul_(gap)
        slope.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf).add_(difference)
        return loss, through_softmax_(slope, q.probs)
