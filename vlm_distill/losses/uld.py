"""ULD: compares probabilities by rank, so teacher and student need not share a vocabulary."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult
from .groups import TokenGroups
from .parameters import check_choice, check_number
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
        tokens: ``all``; or ``unshared``, to compare only the tokens that the other vocabulary lacks, as GOLD does
            beside a divergence over the shared ones (``overlap_kl``). The part P(t₁)·(1 − C) counts as t₁ does.
    """

    takes_groups = True
    scratch = 7
    shared: Tensor | None

    def __init__(self, temperature: float = 1.0, tokens: str = "all") -> None:
        super().__init__()
        self.needs_shared_tokens = check_choice("loss uld: tokens", tokens, ("all", "unshared")) == "unshared"
        if self.needs_shared_tokens:
            self.scratch = 9
        self.register_buffer("shared", None, persistent=False)
        self.temperature = check_number("loss uld: temperature", temperature, 0.0, above=True)

    def share_tokens(self, student: Tensor, teacher: Tensor) -> None:
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
            targets: int64 ``[N]``, read with groups only.
            groups: over the N and M rows.

        Returns:
            ``[N]``; ``[G]`` with groups.
        """
        log_q = (upcast(student_logits) / self.temperature).log_softmax(-1)
        log_p = (upcast(teacher_logits) / self.temperature).log_softmax(-1)
        if groups is None:
            return _distance(self._kept(0, log_q.exp()), self._kept(1, log_p.exp()))
        targets = need_targets(targets)
        q = _merged(log_q, targets, groups.student)
        p = _merged(log_p, groups.teacher_targets, groups.teacher)
        begun = targets[groups.student[:, 0]], groups.teacher_targets[groups.teacher[:, 0]]
        return _distance(self._kept(0, q, begun[0]), self._kept(1, p, begun[1]))

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        student, teacher = soften_(student_logits, teacher_logits, self.temperature)
        q, p = softmax_(student).probs, softmax_(teacher).probs
        loss, slopes = _distance_and_slopes(self._kept(0, q), self._kept(1, p), grad=grad)
        if slopes is None:
            return RowResult(loss)
        slopes = self._kept(0, slopes)
        return RowResult(loss, through_softmax_(slopes.mul_(q), q).div_(self.temperature))

    @torch.no_grad()
    def grouped_loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, groups: TokenGroups, *, grad: bool
    ) -> RowResult:
        student, teacher = soften_(student_logits, teacher_logits, self.temperature)
        log_p = softmax_(teacher).log_probs
        p = _merged(log_p, groups.teacher_targets, groups.teacher)
        p = self._kept(1, p, groups.teacher_targets[groups.teacher[:, 0]])
        log_q, q, _ = softmax_(student)
        begun_with = targets[groups.student[:, 0]]
        merged = self._kept(0, _merged(log_q, targets, groups.student), begun_with)
        loss, slopes = _distance_and_slopes(merged, p, grad=grad)
        if slopes is None:
            return RowResult(loss)
        slopes = self._kept(0, slopes, begun_with)
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

    def _kept(self, side: int, values: Tensor, begun: Tensor | None = None) -> Tensor:
        """Return probabilities or slopes with those of tokens that are not compared set to 0.

        Args:
            side: 0 for the student, 1 for the teacher.
            values: ``[N, V]``; ``[G, V + 1]`` if ``begun`` is given.
            begun: int64 ``[G]``, the first token of each group.
        """
        if not self.needs_shared_tokens:
            return values
        if self.shared is None:
            raise ValueError("uld leaves shared tokens out, and share_tokens was not called")
        shared = self.shared[side]
        if begun is None:
            return values.index_fill(-1, shared, 0.0)
        tokens, split = values[:, :-1].index_fill(-1, shared, 0.0), values[:, -1:]
        return torch.cat([tokens, split.masked_fill(torch.isin(begun, shared).unsqueeze(-1), 0.0)], dim=-1)


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
