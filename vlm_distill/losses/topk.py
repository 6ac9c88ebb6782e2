"""Teachers that give their k likeliest tokens only; all other tokens together are one more category."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult
from .softmax import softmax_, upcast

# Most buffers [N, V] that topk_loss_and_grad holds at once.
SCRATCH = 2


@dataclass
class TopKTargets:
    """The outputs of a cached or served teacher.

    Attributes:
        ids: int64 ``[N, k]``, different tokens in every row.
        logprobs: ``[N, k]``, their log-probabilities at temperature 1.
        tail: ``[N]``, the log-probability of all other tokens together; −∞ if there are none.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopKTargets:
        """Return the k likeliest tokens of ``logits [N, V]``."""
        log_p = upcast(logits).log_softmax(-1)
        top = log_p.topk(k, dim=-1)
        return cls(top.indices, top.values, log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1))

    def __getitem__(self, rows: slice) -> TopKTargets:
        return TopKTargets(self.ids[rows], self.logprobs[rows], self.tail[rows])

    def log_probs(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return log-probabilities ``[n, k + 1]`` of some rows, the tail last."""
        return torch.cat([self.logprobs[rows], self.tail[rows].unsqueeze(-1)], dim=-1).to(dtype)


@torch.no_grad()
def topk_loss_and_grad(
    loss: DistillationLoss, student_logits: Tensor, ids: Tensor, log_p: Tensor, *, grad: bool
) -> RowResult:
    """Compute a loss between the teacher's k + 1 categories and the student's mass in each of them.

    With g_c the derivative by log q_c and r the student's distribution within the tail, the derivative by the logits is
    g_c − q_c·Σg for one of the k tokens, and g_tail·r_j − q_j·Σg for a token of the tail.

    Args:
        loss: with ``takes_topk``.
        student_logits: ``[N, V]``; may be overwritten.
        ids: int64 ``[N, k]``.
        log_p: ``[N, k + 1]``, the tail last.
        grad: whether to compute the gradient.
    """
    log_q, q, _ = softmax_(upcast(student_logits))
    own = log_q.gather(-1, ids)
    log_q.scatter_(-1, ids, -torch.inf)
    tail = log_q.logsumexp(-1, keepdim=True)
    with torch.enable_grad():
        leaf = torch.cat([own, tail], dim=-1).requires_grad_(grad)
        values, signals = loss.loss_over_categories(log_p, leaf)
        g = torch.autograd.grad(values.sum(), leaf)[0] if grad else None
    result = RowResult(values.detach(), None, {name: value.detach() for name, value in signals.items()})
    if g is not None:
        # An empty tail has the logarithm −∞, and none of its entries is read.
        rest = log_q.sub_(tail.masked_fill(tail == -torch.inf, 0.0)).exp_()
        total = g.sum(-1, keepdim=True)
        own_gradient = g[:, :-1] - q.gather(-1, ids) * total
        result.grad = rest.mul_(g[:, -1:]).addcmul_(q, total, value=-1.0).scatter_(-1, ids, own_gradient)
    return result
