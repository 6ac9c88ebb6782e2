"""overlap_kl: a divergence over the tokens that two vocabularies share, for models with different tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import DistillationLoss, Progress, RowResult
from .catalogue import build_divergence
from .errors import LossError
from .groups import TokenGroups
from .parameters import check_number
from .softmax import softmax_, upcast


class OverlapKL(DistillationLoss):
    """A divergence over the tokens that both vocabularies share; all other tokens are one more category.

    If tokenizers differ, groups of one token of each model are compared; the others count as 0. If every token of one
    of the models is shared, there is no further category: both distributions are those over the shared tokens.
    Logged as ``compared``: the share of groups that were compared in the last step.

    Args:
        divergence: any that TAID takes: a name, or ``{name: jsd, beta: 0.1}``.
        temperature: divides both models' logits.
    """

    takes_groups = True
    needs_shared_tokens = True
    signals = ("compared",)
    scratch = 7
    shared: Tensor | None

    def __init__(self, divergence: str | Mapping[str, Any] = "forward_kl", temperature: float = 1.0) -> None:
        super().__init__()
        self.divergence = build_divergence("loss overlap_kl: divergence", divergence)
        self.temperature = check_number("loss overlap_kl: temperature", temperature, 0.0, above=True)
        self._compared = 0.0
        self.register_buffer("shared", None, persistent=False)

    def share_tokens(self, student: Tensor, teacher: Tensor) -> None:
        if not len(student):
            raise LossError("loss overlap_kl: the two vocabularies share no token; use uld or alm")
        self.shared = torch.stack([student, teacher])

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        targets: Tensor | None = None,
        groups: TokenGroups | None = None,
    ) -> Tensor:
        """Compute the loss of each row or group; differentiable by autograd.

        Args:
            student_logits: ``[N, V]``.
            teacher_logits: ``[N, V']``; ``[M, V']`` with groups.
            targets: not read.
            groups: over the N and M rows.

        Returns:
            ``[N]``; ``[G]`` with groups.
        """
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        log_q = (student / self.temperature).log_softmax(-1)
        log_p = (teacher / self.temperature).log_softmax(-1)
        if groups is None:
            return self._compare(log_p, log_q)
        single, rows, other_rows = _single(groups)
        loss = log_q.new_zeros(len(groups))
        return loss.index_copy(0, single, self._compare(log_p[other_rows], log_q[rows]))

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        loss, gradient = self._closed(upcast(student_logits), upcast(teacher_logits), grad=grad)
        return RowResult(loss, gradient, {"compared": torch.ones_like(loss)})

    @torch.no_grad()
    def grouped_loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, groups: TokenGroups, *, grad: bool
    ) -> RowResult:
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        single, rows, other_rows = _single(groups)
        values, gradient = self._closed(student[rows], teacher[other_rows], grad=grad)
        loss = student.new_zeros(len(groups)).index_copy_(0, single, values)
        compared = torch.zeros_like(loss).index_fill_(0, single, 1.0)
        whole = None if gradient is None else torch.zeros_like(student).index_copy_(0, rows, gradient)
        return RowResult(loss, whole, {"compared": compared})

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        self._compared = signals.get("compared", 0.0)

    def metrics(self) -> dict[str, float]:
        return {"compared": self._compared}

    def get_extra_state(self) -> dict[str, Any]:
        return {"compared": self._compared}

    def set_extra_state(self, state: Any) -> None:
        self._compared = float(state["compared"])

    def _compare(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Compute the divergence ``[N]`` of log-probabilities over whole vocabularies; differentiable in ``log_q``."""
        student, teacher, tail = self._ids(log_q.shape[-1], log_p.shape[-1], log_q.device)
        return self.divergence.value(_categories(log_p, teacher, tail=tail), _categories(log_q, student, tail=tail))

    def _closed(self, student: Tensor, teacher: Tensor, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        """Compute the divergence ``[N]`` of logits, and its gradient ``[N, V]``. Overwrites both."""
        ids, other_ids, tail = self._ids(student.shape[-1], teacher.shape[-1], student.device)
        log_p = softmax_(teacher.div_(self.temperature)).log_probs
        log_q, q, _ = softmax_(student.div_(self.temperature))
        # Few numbers depend on the student's categories, and their logarithms' derivatives suffice.
        with torch.enable_grad():
            leaf = _categories(log_q, ids, tail=tail).requires_grad_(grad)
            loss = self.divergence.value(_categories(log_p, other_ids, tail=tail), leaf)
            slope = torch.autograd.grad(loss.sum(), leaf)[0] if grad else None
        if slope is None:
            return loss.detach(), None
        # By a logit of category c: its share of the category times (slope_c − category's probability · Σ slope). Tokens
        # outside every category have no share.
        total = slope.sum(-1, keepdim=True)
        by_category = slope - leaf.exp() * total
        gradient = torch.zeros_like(q)
        if tail:
            outside = q.index_fill(-1, ids, 0.0)
            mass = outside.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
            gradient = outside.div_(mass).mul_(by_category[:, -1:])
            by_category = by_category[:, :-1]
        gradient.index_copy_(-1, ids, by_category.contiguous())
        return loss.detach(), gradient.div_(self.temperature)

    def _ids(self, vocabulary: int, teacher_vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor, bool]:
        """Return the shared tokens' ids in both models, and whether both models have other tokens.

        Without ``share_tokens``, vocabularies of one size are the same.
        """
        if self.shared is None:
            if vocabulary != teacher_vocabulary:
                raise ValueError("overlap_kl compares shared tokens, and share_tokens was not called")
            every = torch.arange(vocabulary, device=device)
            return every, every, False
        count = self.shared.shape[1]
        return self.shared[0], self.shared[1], count < min(vocabulary, teacher_vocabulary)


def _single(groups: TokenGroups) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers of the groups of one token of each model, and these tokens' rows in both."""
    lengths = groups.student[:, 1] - groups.student[:, 0]
    other_lengths = groups.teacher[:, 1] - groups.teacher[:, 0]
    single = ((lengths == 1) & (other_lengths == 1)).nonzero().flatten()
    return single, groups.student[single, 0], groups.teacher[single, 0]


def _categories(log_probs: Tensor, ids: Tensor, *, tail: bool) -> Tensor:
    """Return log-probabilities ``[N, K + 1]`` of shared tokens and the rest; without a tail ``[N, K]``, of sum 1."""
    own = log_probs.index_select(-1, ids)
    if not tail:
        return own.log_softmax(-1)
    rest = log_probs.index_fill(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([own, rest], dim=-1)
