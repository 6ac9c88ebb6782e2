"""``Divergence``: the base of losses that compare the teacher's distribution p with the student's q.

Logits are divided by the temperature T; only KD has the factor T². A token whose logit is −∞ in both models is
outside the vocabulary: it adds nothing and receives no gradient.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from . import kernels
from .base import DistillationLoss, RowResult
from .kernels import Form, Kind
from .parameters import check_number
from .softmax import Softmax, soften_, softmax_, upcast


class Divergence(DistillationLoss):
    """A loss that compares two distributions over the same categories, and reads nothing else of the logits.

    A subclass writes its definition (``value``) and, for speed, the closed form of its gradient (``value_and_grad``).

    Attributes:
        label: its name in messages.
        kind: the kernels' name for it; ``None``: they do not compute it.

    Args:
        temperature: divides both models' logits.
    """

    label: ClassVar[str]
    kind: ClassVar[Kind | None] = None

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        label = getattr(self, "label", type(self).__name__)
        self.temperature = check_number(f"loss {label}: temperature", temperature, 0.0, above=True)
        self.factor = 1.0
        self.share = 0.0
        # The tail's mass at another temperature does not follow from its mass at 1.
        self.takes_topk = self.temperature == 1.0

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Compute the divergence from its definition, differentiable in ``log_q``.

        Args:
            log_p: ``[N, V]``, log-probabilities of the teacher, or of any other target.
            log_q: ``[N, V]``, those of the student.

        Returns:
            ``[N]`` nats.
        """
        raise NotImplementedError

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        """Compute the divergence ``[N]`` and its derivative ``[N, V]`` by the logits of ``q`` (``None`` without grad).

        May overwrite both arguments.
        """
        with torch.enable_grad():
            # Log-probabilities are logits, too: a row's derivative is the same by all logits of its softmax.
            logits = q.log_probs.detach().requires_grad_(grad)
            loss = self.value(p.log_probs, logits.log_softmax(-1))
            gradient = torch.autograd.grad(loss.sum(), logits)[0] if grad else None
        return loss.detach(), gradient

    def of_logits_(self, x: Tensor, y: Tensor, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        """Compute ``value_and_grad`` of softmax(x) and softmax(y), ``[N, V]``; may overwrite both."""
        return self.value_and_grad(softmax_(x), softmax_(y), grad=grad)

    def kernel_form(self) -> Form | None:
        return None if self.kind is None else Form(self.kind, self.share, self.temperature, self.factor)

    def loss_over_categories(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.value(log_p, log_q), {}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        student, teacher = upcast(student_logits) / self.temperature, upcast(teacher_logits) / self.temperature
        return self.factor * self.value(teacher.log_softmax(-1), student.log_softmax(-1))

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        form = self.kernel_form()
        if form is not None and student_logits.is_cuda:
            loss, gradient, _ = kernels.loss_and_grad(form, upcast(student_logits), upcast(teacher_logits), grad=grad)
            return RowResult(loss, gradient)
        student, teacher = soften_(student_logits, teacher_logits, self.temperature)
        loss, gradient = self.of_logits_(teacher, student, grad=grad)
        if self.factor != 1.0:
            loss = loss * self.factor
        if gradient is not None and self.factor != self.temperature:
            gradient.mul_(self.factor / self.temperature)
        return RowResult(loss, gradient)
