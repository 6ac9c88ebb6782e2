"""Groups of tokens that spell the same text, and how they are cut into chunks and blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TokenGroups:
    """Runs of student and teacher tokens that spell the same text, for models with different tokenizers.

    If the student writes an answer as ``gr``, ``oen``, ``<end>`` and the teacher as ``groen``, ``<end>``, there are two
    groups: ``student = [[0, 2], [2, 3]]`` and ``teacher = [[0, 1], [1, 2]]``.

    Attributes:
        student: int64 ``[G, 2]``, first and one past the last of the student's N supervised tokens in each group.
        teacher: int64 ``[G, 2]``, the same of the teacher's M supervised tokens.
        teacher_targets: int64 ``[M]``, the teacher's supervised token ids.
    """

    student: Tensor
    teacher: Tensor
    teacher_targets: Tensor

    def __len__(self) -> int:
        return len(self.student)

    def to(self, device: torch.device | str) -> TokenGroups:
        """Return the groups on ``device``; the copy does not block."""
        tensors = (self.student, self.teacher, self.teacher_targets)
        return TokenGroups(*(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass
class GroupBlock:
    """Some whole groups, with the positions that they cover.

    Attributes:
        student: int64 ``[n]``, the student's positions.
        teacher: int64 ``[m]``, the teacher's positions.
        groups: the groups, counted within these positions.
    """

    student: Tensor
    teacher: Tensor
    groups: TokenGroups


def sum_groups(values: Tensor, spans: Tensor) -> Tensor:
    """Return the sums ``[G]`` of ``values [N]`` over the groups' spans ``[G, 2]``; differentiable."""
    first, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
    group = torch.arange(len(spans), device=spans.device).repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    rows = first[group] + torch.arange(len(group), device=spans.device) - before[group]
    return values.new_zeros(len(spans)).index_add(0, group, values[rows])


def group_chunks(
    groups: TokenGroups, row_bytes: tuple[int, int], block_bytes: int, chunk_bytes: int
) -> Iterator[list[GroupBlock]]:
    """Yield chunks, each a list of blocks of whole groups, in order.

    Args:
        groups: all groups.
        row_bytes: size of a row of the student's logits, and of the teacher's.
        block_bytes: limit of both models' logits of a block, exceeded only by a single group.
        chunk_bytes: limit of both models' logits of a chunk, exceeded only by a single block.
    """
    student_spans, teacher_spans = groups.student.tolist(), groups.teacher.tolist()
    sizes = []
    for (first, stop), (teacher_first, teacher_stop) in zip(student_spans, teacher_spans, strict=True):
        sizes.append((stop - first) * row_bytes[0] + (teacher_stop - teacher_first) * row_bytes[1])
    blocks = _pack(sizes, block_bytes)
    block_sizes = [sum(sizes[block]) for block in blocks]
    for chunk in _pack(block_sizes, chunk_bytes):
        yield [_block(groups, student_spans[block], teacher_spans[block]) for block in blocks[chunk]]


def _pack(sizes: Sequence[int], limit: int) -> list[slice]:
    """Put neighbours together up to a limit of the sum of their sizes."""
    cuts, total = [0], 0
    for i, size in enumerate(sizes):
        if i > cuts[-1] and total + size > limit:
            cuts.append(i)
            total = 0
        total += size
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True) if a < b]


def _block(groups: TokenGroups, student_spans: list[list[int]], teacher_spans: list[list[int]]) -> GroupBlock:
    device = groups.student.device
    student, spans = _close_up(student_spans, device)
    teacher, other_spans = _close_up(teacher_spans, device)
    return GroupBlock(student, teacher, TokenGroups(spans, other_spans, groups.teacher_targets[teacher]))


def _close_up(spans: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions that spans cover, and the spans counted within these positions."""
    positions: list[int] = []
    for first, stop in spans:
        positions.extend(range(first, stop))
    lengths = torch.tensor([stop - first for first, stop in spans])
    stops = lengths.cumsum(0)
    return torch.tensor(positions, device=device), torch.stack([stops - lengths, stops], 1).to(device)
