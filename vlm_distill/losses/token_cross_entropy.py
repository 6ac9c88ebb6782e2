"""Cross-entropy with the right tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult
from .kernels import Form, Kind
from .softmax import need_targets, softmax_, upcast


class CrossEntropy(DistillationLoss):
    """Cross-entropy with the right tokens, −log q(target): learning from the data, without a teacher."""

    needs = frozenset({"targets"})
    scratch = 1

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        log_q = upcast(student_logits).log_softmax(-1)
        return -log_q.gather(-1, need_targets(targets).unsqueeze(-1)).squeeze(-1)

    def kernel_form(self) -> Form:
        return Form(Kind.CROSS_ENTROPY, t=0.0)

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        index = need_targets(targets).unsqueeze(-1)
        q = softmax_(upcast(student_logits))
        loss = -q.log_probs.gather(-1, index).squeeze(-1)
        if not grad:
            return RowResult(loss)
        return RowResult(loss, q.probs.scatter_add_(-1, index, q.probs.new_full(index.shape, -1.0)))
