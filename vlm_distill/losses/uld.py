"""ULD: compares probabilities by rank, so teacher and student need not share a vocabulary."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult
from .groups import TokenGroups
from .parameters import check_number
from .softmax import need_targets, soften_, softmax_, through_softmax_, upcast


class ULD(DistillationLoss):
    """Universal logit distillation, Σ|p₍ₖ₎ − q₍ₖ₎| over probabilities in descending order (Boizard et al., 2024).

    This is the paper's closed form of the Wasserstein distance at a uniform cost; the smaller vocabulary is padded with
    zeros. It lies between 0 and 2. Where p₍ₖ₎ = q₍ₖ₎ it has no derivative, and 0 is used.

    If tokenizers differ, groups of tokens that spell the same text are compared. With t₁ … tₙ a group's tokens on one
    side and C = P(t₂ … tₙ | t₁), that side's distribution is the one at the first position, with P(t₁) split in two:
    P(t₁)·C for the whole group and P(t₁)·(1 − C) for everything that begins with t₁ and continues differently. It sums
    to 1.

    Args:
        temperature: divides both models' logits.
    """

    takes_groups = True
    scratch = 7

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_number("loss uld: temperature", temperature, 0.0, above=True)

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
            targets: int64 ``[N]``, read with groups only.
            groups: over the N and M rows.

        Returns:
            ``[N]``; ``[G]`` with groups.
        """
        log_q = (upcast(student_logits) / self.temperature).log_softmax(-1)
        log_p = (upcast(teacher_logits) / self.temperature).log_softmax(-1)
        if groups is None:
            return _distance(log_q.exp(), log_p.exp())
        q = _merged(log_q, need_targets(targets), groups.student)
        return _distance(q, _merged(log_p, groups.teacher_targets, groups.teacher))

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        student, teacher = soften_(student_logits, teacher_logits, self.temperature)
        q, p = softmax_(student).probs, softmax_(teacher).probs
        loss, slopes = _distance_and_slopes(q, p, grad=grad)
        if slopes is None:
            return RowResult(loss)
        return RowResult(loss, through_softmax_(slopes.mul_(q), q).div_(self.temperature))

    @torch.no_grad()
    def grouped_loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, groups: TokenGroups, *, grad: bool
    ) -> RowResult:
        student, teacher = soften_(student_logits, teacher_logits, self.temperature)
        log_p = softmax_(teacher).log_probs
        p = _merged(log_p, groups.teacher_targets, groups.teacher)
        log_q, q, _ = softmax_(student)
        loss, slopes = _distance_and_slopes(_merged(log_q, targets, groups.student), p, grad=grad)
        if slopes is None:
            return RowResult(loss)
        members = _members(groups.student)
        first, index = q[members.first], targets[members.first].unsqueeze(-1)
        log_chain = _log_chain(log_q, targets, members)
        chain, other = log_chain.exp(), -torch.expm1(log_chain)
        # Derivative by q: both parts of P(t₁) count for t₁. By log C: what P(t₁)·C gains, P(t₁)·(1 − C) loses.
        slopes, split = slopes[:, :-1], slopes[:, -1:]
        begun = slopes.gather(-1, index)
        by_chain = (first.gather(-1, index) * chain * (begun - split))[members.group]
        slopes.scatter_(-1, index, chain * begun + other * split)
        # Rows of later tokens: the derivative of their logarithm, onehot − q. Rows of first tokens: through the
        # softmax.
        gradient = q
        weight = q.new_zeros(len(q), 1).index_copy_(0, members.later, by_chain)
        gradient.mul_(-weight).scatter_add_(-1, targets.unsqueeze(-1), weight)
        gradient.index_copy_(0, members.first, through_softmax_(slopes.mul_(first), first))
        return RowResult(loss, gradient.div_(self.temperature))


class _Members(NamedTuple):
    """The rows of G groups.

    Attributes:
        first: ``[G]``, each group's first row.
        later: ``[K]``, all other rows.
        group: ``[K]``, the group of each of these.
    """

    first: Tensor
    later: Tensor
    group: Tensor


def _members(spans: Tensor) -> _Members:
    first, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
    group = torch.arange(len(spans), device=spans.device).repeat_interleave(lengths - 1)
    before = (lengths - 1).cumsum(0) - (lengths - 1)
    later = first[group] + 1 + torch.arange(len(group), device=spans.device) - before[group]
    return _Members(first, later, group)


def _log_chain(log_probs: Tensor, targets: Tensor, members: _Members) -> Tensor:
    """Compute log C ``[G, 1]``; 0 for a group of one token."""
    own = log_probs[members.later].gather(-1, targets[members.later].unsqueeze(-1))
    return log_probs.new_zeros(len(members.first), 1).index_add(0, members.group, own)


def _merged(log_probs: Tensor, targets: Tensor, spans: Tensor) -> Tensor:
    """Compute the groups' distributions ``[G, V + 1]``, differentiable in ``log_probs [N, V]``."""
    members = _members(spans)
    probs, index = log_probs[members.first].exp(), targets[members.first].unsqueeze(-1)
    log_chain, begun = _log_chain(log_probs, targets, members), probs.gather(-1, index)
    return torch.cat([probs.scatter(-1, index, begun * log_chain.exp()), begun * -torch.expm1(log_chain)], dim=-1)


def _distance(q: Tensor, p: Tensor) -> Tensor:
    """Compute the distances ``[N]`` of probabilities ``[N, V]`` and ``[N, V']``; differentiable in both."""
    q, p = q.sort(-1, descending=True).values, p.sort(-1, descending=True).values
    width = min(q.shape[-1], p.shape[-1])
    return (q[:, :width] - p[:, :width]).abs().sum(-1) + q[:, width:].sum(-1) + p[:, width:].sum(-1)


def _distance_and_slopes(q: Tensor, p: Tensor, *, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the distances and their derivative by ``q`` ``[N, V]``: the sign of each probability's difference."""
    p, order = _ascending(p), _order(q) if grad else None
    q = _ascending(q) if order is None else q.gather(-1, order)
    width = min(q.shape[-1], p.shape[-1])
    q_beyond, gap = q.tensor_split([q.shape[-1] - width], dim=-1)
    p_beyond, p = p.tensor_split([p.shape[-1] - width], dim=-1)
    gap.sub_(p)
    loss = gap.abs().sum(-1) + q_beyond.sum(-1) + p_beyond.sum(-1)
    if order is None:
        return loss, None
    gap.sign_()
    q_beyond.fill_(1.0)
    return loss, torch.empty_like(q).scatter_(-1, order, q)


# On a CPU, NumPy sorts float32 rows of 32,768 fourteen times as fast as torch, and finds their order in a third of the
# time. Torch does not require it, so neither does this file.
_HAS_NUMPY = find_spec("numpy") is not None


def _ascending(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not _HAS_NUMPY:
        return x.sort(-1).values
    ordered = x.numpy().copy()
    ordered.sort(axis=-1)
    return torch.from_numpy(ordered)


def _order(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not _HAS_NUMPY:
        return x.argsort(-1)
    return torch.from_numpy(x.numpy().argsort(axis=-1))
