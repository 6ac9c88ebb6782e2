"""Forward KL, and KD: forward KL between softened distributions."""

from __future__ import annotations

from torch import Tensor

from .divergence import Divergence
from .kernels import Kind
from .softmax import Softmax, kl_divergence, kl_of_logits_, relative_entropy_


class ForwardKL(Divergence):
    """Forward KL, KL(p‖q): the student covers everything the teacher may say (Hinton et al., 2015).

    Args:
        temperature: divides both models' logits.
    """

    label = "forward_kl"
    kind = Kind.FORWARD_KL
    scratch = 2

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_divergence(log_p, log_q)

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        loss, _ = relative_entropy_(p, q)
        return loss, q.probs.sub_(p.probs) if grad else None

    def of_logits_(self, x: Tensor, y: Tensor, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        found = kl_of_logits_(x, y, grad=grad)
        return found.value, found.gradient


class KD(ForwardKL):
    """Knowledge distillation, T²·KL(p‖q) with both softmaxes at temperature T (Hinton et al., 2015).

    The factor T² keeps the gradient's size when T changes.

    Args:
        temperature: T.
    """

    label = "kd"

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__(temperature)
        self.factor = self.temperature**2
