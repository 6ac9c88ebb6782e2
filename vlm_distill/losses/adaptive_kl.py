"""Adaptive KL: forward and reverse KL weighted by where the two distributions differ."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import Divergence
from .parameters import check_choice, check_number
from .softmax import Softmax, kl_divergence, relative_entropy_, through_softmax_


class AdaptiveKL(Divergence):
    """Adaptive KL, h·KL(p‖q) + (1−h)·KL(q‖p), h the head's share of Σ|p−q|, taken as constant (Wu et al., 2024).

    The head holds the teacher's likeliest tokens: going down from the largest p, a token belongs to the tail once the
    cumulative mass including it exceeds ``mu``; the first token is always head, and ties go to the lower index. Where
    p = q, h = ½.

    Args:
        mu: probability mass of the head.
        temperature: divides both models' logits.
        convention: ``paper``, or ``taid``: the TAID paper's baseline as its code computes it, errors included. Tokens
            are sorted in ascending order, the mask in that order is applied to the unsorted gaps (those from ``mu`` on
            count), the cross-entropy of p and q replaces KL(p‖q), and h is differentiated. Takes no top-k teacher.
    """

    label = "adaptive_kl"
    scratch = 8

    def __init__(self, mu: float = 0.5, temperature: float = 1.0, convention: str = "paper") -> None:
        super().__init__(temperature)
        self.mu = check_number("loss adaptive_kl: mu", mu, 0.0, 1.0)
        self._taid = check_choice("loss adaptive_kl: convention", convention, ("paper", "taid")) == "taid"
        self.takes_topk = self.takes_topk and not self._taid

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self._taid:
            return self._as_in_taid(log_p, log_q)
        head = self._head_share(log_p.detach().exp(), log_q.detach().exp())
        return head * kl_divergence(log_p, log_q) + (1.0 - head) * kl_divergence(log_q, log_p)

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        if self._taid:
            with torch.enable_grad():
                leaf = q.log_probs.requires_grad_(grad)
                value = self._as_in_taid(p.log_probs, leaf)
                slope = torch.autograd.grad(value.sum(), leaf)[0] if grad else None
            return value.detach(), None if slope is None else through_softmax_(slope, q.probs)
        head = self._head_share(p.probs, q.probs)
        reverse, summands = relative_entropy_(Softmax(q.log_probs.clone(), q.probs, q.log_total), p)
        forward, _ = relative_entropy_(p, q)
        loss = head * forward + (1.0 - head) * reverse
        if not grad:
            return loss, None
        summands.addcmul_(q.probs, reverse.unsqueeze(-1), value=-1.0).mul_((1.0 - head).unsqueeze(-1))
        return loss, summands.addcmul_(q.probs.sub_(p.probs), head.unsqueeze(-1))

    def _head_share(self, p: Tensor, q: Tensor) -> Tensor:
        """Compute the head's share ``[N]`` of the gaps between both distributions."""
        ordered, order = torch.sort(p, dim=-1, descending=True, stable=True)
        tail = ordered.cumsum(-1) > self.mu
        tail[:, 0] = False
        gap = (p - q).abs_().gather(-1, order)
        return _share(gap.masked_fill(tail, 0.0).sum(-1), gap.sum(-1))

    def _as_in_taid(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Compute the divergence by the convention ``taid``."""
        p = log_p.exp()
        head = p.sort(-1).values.cumsum(-1) >= self.mu
        gap = (p - log_q.exp()).abs()
        share = _share((gap * head).sum(-1), gap.sum(-1))
        cross_entropy = -torch.where(p > 0, p * log_q, 0.0).sum(-1)
        return share * cross_entropy + (1.0 - share) * kl_divergence(log_q, log_p)


def _share(part: Tensor, total: Tensor) -> Tensor:
    """Compute part/total ``[N]``; ½ if the total is 0."""
    return torch.where(total > 0, part / torch.where(total > 0, total, 1.0), 0.5)
