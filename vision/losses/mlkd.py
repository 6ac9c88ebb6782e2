"""MLKD: compares images, pairs of images and pairs of classes, at several temperatures, in a weak and a strong view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_distill.losses import BatchLoss, LossError
from vlm_distill.losses.parameters import check_choice, check_flag, check_number
from vlm_distill.losses.softmax import kl_divergence, upcast
from vlm_distill.losses.standardise import standardised

# Temperatures at which the authors' training step uses the weak view's logits for the strong view.
_WEAK_INSTEAD = (2.0, 6.0)


class MLKD(BatchLoss):
    """Multi-level logit distillation, instance + batch + class terms (Jin et al., CVPR 2023).

    With P and Q the matrices of both models' probabilities ``[N, C]`` at a temperature T, for N images of one view:

    - instance: T²·mean of rows' KL(p‖q);
    - batch: ‖P Pᵀ − Q Qᵀ‖²/N, how alike the images are;
    - class: ‖Pᵀ P − Qᵀ Q‖²/C, how alike the classes are;

    summed over the temperatures and both views. The paper's cross-entropy of both views is a term of its own.

    Args:
        temperatures: the paper's 4 and 3, 5, 2, 6; for ImageNet the first is 1.
        variant: ``paper``, or ``published``: as the authors' training step computes it. It
            applies the masks after averaging, so each of the weak view's terms is only multiplied by the masked share:
            the share of images (instance and batch terms) on which the teacher is at most as confident as
            on the median one, and of classes with at most median mass. The strong view has the instance term only,
            unmasked, and uses the weak view's logits at the temperatures 2 and 6.
        standardise: whether the instance term sees standardised logits, as in the code of Sun et al. (CVPR 2024).
    """

    views = 2

    def __init__(
        self,
        temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0),
        variant: str = "paper",
        standardise: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(temperatures, str) or not isinstance(temperatures, Sequence) or not temperatures:
            raise LossError(f"loss mlkd: temperatures is {temperatures!r}; give a list of numbers above 0")
        self.temperatures = [check_number("loss mlkd: temperatures", t, 0.0, above=True) for t in temperatures]
        self.variant = check_choice("loss mlkd: variant", variant, ("paper", "published"))
        self.standardise = check_flag("loss mlkd: standardise", standardise)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None) -> Tensor:
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        if self.variant == "published":
            return self._published(*student.chunk(2), *teacher.chunk(2))
        views = [x.unflatten(0, (2, -1)) for x in (student, teacher)]
        p, q = (self._soften(x).softmax(-1) for x in reversed(views))
        of_images, of_classes = relation_terms(q, p)
        return (self._instance(*views) + of_images + of_classes).sum()

    def _published(self, weak: Tensor, strong: Tensor, teacher_weak: Tensor, teacher_strong: Tensor) -> Tensor:
        sure = teacher_weak.softmax(-1)
        images, classes = _lower_half(sure.amax(-1)), _lower_half(sure.sum(0))
        p, q = (self._soften(x).softmax(-1) for x in (teacher_weak, weak))
        of_weak, of_strong = self._instance(weak, teacher_weak), self._instance(strong, teacher_strong)
        instead = torch.tensor([t in _WEAK_INSTEAD for t in self.temperatures], device=weak.device)
        second = torch.where(instead, of_weak, of_strong)
        of_images, of_classes = relation_terms(q, p)
        return (images * (of_weak + of_images) + classes * of_classes + second).sum()

    def _soften(self, logits: Tensor) -> Tensor:
        """Divide logits ``[..., N, C]`` by each temperature: ``[temperatures, ..., N, C]``."""
        return logits / logits.new_tensor(self.temperatures).view(-1, *[1] * logits.ndim)

    def _instance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.standardise:
            student, teacher = standardised(student), standardised(teacher)
        return instance_terms(self._soften(student), self._soften(teacher), self.temperatures)


def instance_terms(student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Compute T²·mean over rows of KL(p‖q), ``[temperatures, ...]``, from logits ``[temperatures, ..., N, C]``."""
    rows = kl_divergence(teacher.log_softmax(-1), student.log_softmax(-1)).mean(-1)
    return rows * rows.new_tensor(temperatures).square().view(-1, *[1] * (rows.ndim - 1))


def relation_terms(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ‖P Pᵀ − Q Qᵀ‖²/N and ‖Pᵀ P − Qᵀ Q‖²/C, both ``[...]``, from probabilities ``[..., N, C]``.

    Forms only matrices of the smaller of the two sizes. With D = P − Q, S = P + Q and X = S Dᵀ the first difference
    is (X + Xᵀ)/2, and ‖Pᵀ P − Qᵀ Q‖² = (⟨D Dᵀ, S Sᵀ⟩ + ⟨X, Xᵀ⟩)/2; neither loses digits as Q approaches P.
    """
    images, classes = p.shape[-2:]
    wide = images <= classes
    if not wide:
        p, q = p.mT, q.mT
    d, s = p - q, p + q
    x = s @ d.mT
    near = (x + x.mT).square().sum((-2, -1)) / 4
    far = ((d @ d.mT) * (s @ s.mT) + x * x.mT).sum((-2, -1)) / 2
    return (near / images, far / classes) if wide else (far / images, near / classes)


def _lower_half(values: Tensor) -> Tensor:
    """Return the share of values that are at most the median (halfway between two middle values)."""
    return (values <= values.quantile(0.5)).to(values.dtype).mean()
