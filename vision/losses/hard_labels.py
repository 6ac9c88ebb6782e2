"""Hard distillation: the teacher's decision is the label."""

from __future__ import annotations

from torch import Tensor

from vlm_distill.losses import DistillationLoss, RowResult
from vlm_distill.losses.softmax import upcast

from .label_cross_entropy import CrossEntropy


class HardLabels(DistillationLoss):
    """Cross-entropy with the teacher's likeliest class, −log q(argmax p) (Touvron et al., DeiT, ICML 2021).

    Even for mixed images with mixed labels, the teacher decides for one class.
    """

    scratch = 1

    def __init__(self) -> None:
        super().__init__()
        self._cross_entropy = CrossEntropy()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        return self._cross_entropy(student_logits, None, upcast(teacher_logits).argmax(-1))

    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        return self._cross_entropy.loss_and_grad(student_logits, None, upcast(teacher_logits).argmax(-1), grad=grad)
