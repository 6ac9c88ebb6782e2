"""The generalised Jensen-Shannon divergence."""

from __future__ import annotations

from torch import Tensor

from .divergence import Divergence
from .forward_kl import ForwardKL
from .kernels import Form, Kind
from .parameters import check_choice, check_number
from .reverse_kl import ReverseKL
from .softmax import Softmax, kl_divergence, kl_summands_, log_mixture, mixture


class JSD(Divergence):
    """Generalised Jensen-Shannon divergence, β KL(p‖m) + (1−β) KL(q‖m), m = β p + (1−β) q (Agarwal et al., 2024).

    Args:
        beta: β, the teacher's weight; at 0 and at 1 the divergence is 0.
        temperature: divides both models' logits.
        convention: ``paper``, or ``limit`` as in TRL and Liger Kernel: KL(p‖q) at β = 0 and KL(q‖p) at β = 1, the
            limits of the divergence divided by β (1−β).
    """

    label = "jsd"
    kind = Kind.JSD
    scratch = 3

    def __init__(self, beta: float = 0.5, temperature: float = 1.0, convention: str = "paper") -> None:
        super().__init__(temperature)
        self.beta = self.share = check_number("loss jsd: beta", beta, 0.0, 1.0)
        self._limit: Divergence | None = None
        if check_choice("loss jsd: convention", convention, ("paper", "limit")) == "limit" and self.beta in (0.0, 1.0):
            self._limit = ForwardKL() if self.beta == 0.0 else ReverseKL()

    def kernel_form(self) -> Form | None:
        kind = self.kind if self._limit is None else self._limit.kind
        return None if kind is None else Form(kind, self.share, self.temperature)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self._limit is not None:
            return self._limit.value(log_p, log_q)
        log_m = log_mixture(log_p, log_q, self.beta)
        return self.beta * kl_divergence(log_p, log_m) + (1.0 - self.beta) * kl_divergence(log_q, log_m)

    def of_logits_(self, x: Tensor, y: Tensor, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        if self._limit is not None:
            return self._limit.of_logits_(x, y, grad=grad)
        return super().of_logits_(x, y, grad=grad)

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        if self._limit is not None:
            return self._limit.value_and_grad(p, q, grad=grad)
        log_m = mixture(p, q, self.beta).log_()
        p_part = kl_summands_(p, log_m).sum(-1)
        q_summands = kl_summands_(q, log_m)
        q_part = q_summands.sum(-1)
        loss = self.beta * p_part + (1.0 - self.beta) * q_part
        if not grad:
            return loss, None
        # (1−β) q·(log q/m − KL(q‖m)): the derivatives through m cancel.
        return loss, q_summands.addcmul_(q.probs, q_part.unsqueeze(-1), value=-1.0).mul_(1.0 - self.beta)
