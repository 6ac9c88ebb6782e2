"""Reverse KL."""

from __future__ import annotations

from torch import Tensor

from .divergence import Divergence
from .kernels import Kind
from .softmax import Softmax, kl_divergence, relative_entropy_


class ReverseKL(Divergence):
    """Reverse KL, KL(q‖p): the student keeps to what the teacher says most (Gu et al., 2024).

    Infinite if the student gives mass to a token that the teacher rules out.

    Args:
        temperature: divides both models' logits.
    """

    label = "reverse_kl"
    kind = Kind.REVERSE_KL
    scratch = 2

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_divergence(log_q, log_p)

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        loss, summands = relative_entropy_(q, p)
        # d KL(q‖p) / d logits = q·(log q/p − KL)
        return loss, summands.addcmul_(q.probs, loss.unsqueeze(-1), value=-1.0) if grad else None
