"""The total variation distance."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import Divergence
from .kernels import Kind, agree
from .softmax import Softmax, through_softmax_


class TVD(Divergence):
    """Total variation distance, ½ Σ|p−q| (Wen et al., 2023): bounded, so that no token dominates the gradient.

    Where p = q it has no derivative; 0 is used there, and wherever the two are equal but for rounding.

    Args:
        temperature: divides both models' logits.
    """

    label = "tvd"
    kind = Kind.TVD
    scratch = 5

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        return 0.5 * torch.where(agree(p, q), 0.0, q - p).abs().sum(-1)

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        same = agree(p.probs, q.probs)
        gap = torch.sub(q.probs, p.probs, out=p.probs).masked_fill_(same, 0.0)
        loss = 0.5 * gap.abs().sum(-1)
        if not grad:
            return loss, None
        return loss, through_softmax_(gap.sign_().mul_(0.5).mul_(q.probs), q.probs)
