"""MLKD: images, pairs of images and pairs of classes, at several temperatures, on a weak and a strong view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_distill.losses import BatchLoss, LossError
from vlm_distill.losses.parameters import check_choice, check_number
from vlm_distill.losses.softmax import kl_divergence, upcast
from vlm_distill.losses.standardise import standardised

# Where the authors' training step takes the weak view's logits for the strong view's.
_WEAK_INSTEAD = (2.0, 6.0)


class MLKD(BatchLoss):
    """Multi-level logit distillation, instance + batch + class terms (Jin et al., CVPR 2023).

    With P and Q the matrices of both models' probabilities ``[N, C]`` at a temperature T, for N images of one view:

    - instance: T²·mean of rows' KL(p‖q);
    - batch: ‖P Pᵀ − Q Qᵀ‖²/N, how alike the images are;
    - class: ‖Pᵀ P − Qᵀ Q‖²/C, how alike the classes are;

    summed over the temperatures and both views. The cross-entropy of both views that the paper adds is another term.

    Args:
        temperatures: the paper's 4 and 3, 5, 2, 6; for ImageNet the first is 1.
        variant: ``paper``, or ``published``: as the authors' training step computes it. There the masks of half of the
            images and classes multiply means that are taken already, so that they scale the weak view's terms by the
            masked share: of images (instance and batch terms) whose teacher is at most as sure as the median one, of
            classes of at most median mass. The strong view has the instance term alone, unmasked, and at the
            temperatures 2 and 6 takes the weak view's logits.
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
        if not isinstance(standardise, bool):
            raise LossError(f"loss mlkd: standardise is {standardise!r}; give true or false")
        self.standardise = standardise

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
        """``[..., N, C]`` at each temperature: ``[temperatures, ..., N, C]``."""
        return logits / logits.new_tensor(self.temperatures).view(-1, *[1] * logits.ndim)

    def _instance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.standardise:
            student, teacher = standardised(student), standardised(teacher)
        return instance_terms(self._soften(student), self._soften(teacher), self.temperatures)


def instance_terms(student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
    """T²·mean over rows of KL(p‖q), ``[temperatures, ...]``, of softened logits ``[temperatures, ..., N, C]``."""
    rows = kl_divergence(teacher.log_softmax(-1), student.log_softmax(-1)).mean(-1)
    return rows * rows.new_tensor(temperatures).square().view(-1, *[1] * (rows.ndim - 1))


def relation_terms(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """‖P Pᵀ − Q Qᵀ‖²/N and ‖Pᵀ P − Qᵀ Q‖²/C, both ``[...]``, of probabilities ``[..., N, C]``.

    Only matrices of the smaller of the two sizes are made. With D = P − Q, S = P + Q and X = S Dᵀ the first difference
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
    """Which share is at most the median, that of two middle values being halfway between them."""
    return (values <= values.quantile(0.5)).to(values.dtype).mean()
