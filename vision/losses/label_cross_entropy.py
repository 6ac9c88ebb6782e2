"""Cross-entropy with labels: plain, smoothed, or the mixed labels of mixed images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_distill.losses import DistillationLoss, RowResult
from vlm_distill.losses.parameters import check_number
from vlm_distill.losses.softmax import need_targets, softmax_, upcast


class CrossEntropy(DistillationLoss):
    """Cross-entropy with the labels, −Σ y log q: learning from the data, without a teacher.

    Targets are the right classes (int64 ``[N]``), or each class's share (float ``[N, C]``) as from Mixup and CutMix.
    Smoothing spreads a share evenly over all classes: y becomes (1 − ε) y + ε/C (Szegedy et al., 2016).

    Args:
        label_smoothing: ε, from 0 to 1.
    """

    needs = frozenset({"targets"})
    soft_targets = True
    scratch = 2

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = check_number("loss cross_entropy: label_smoothing", label_smoothing, 0.0, 1.0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        logits, targets = upcast(student_logits), need_targets(targets)
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        q, targets = softmax_(upcast(student_logits)), need_targets(targets)
        smooth = self.label_smoothing
        if targets.is_floating_point():
            shares = targets.to(q.probs.dtype) * (1.0 - smooth) + smooth / q.probs.shape[-1]
            loss = -(shares * q.log_probs).sum(-1)
            # q − y; the shares need not sum to 1.
            return RowResult(loss, q.probs.mul_(shares.sum(-1, keepdim=True)).sub_(shares) if grad else None)
        index = targets.unsqueeze(-1)
        loss = -q.log_probs.gather(-1, index).squeeze(-1)
        if smooth:
            loss = loss.mul_(1.0 - smooth).sub_(q.log_probs.mean(-1), alpha=smooth)
        if not grad:
            return RowResult(loss)
        gradient = q.probs.scatter_add_(-1, index, q.probs.new_full(index.shape, smooth - 1.0))
        return RowResult(loss, gradient.sub_(smooth / q.probs.shape[-1]) if smooth else gradient)
