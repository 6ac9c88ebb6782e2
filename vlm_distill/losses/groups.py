"""Groups of rows taken in pieces: chunks for the matrix products, each of some blocks for the losses."""

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
    """Some whole groups.

    Attributes:
        student: int64 ``[n]``, the student's rows that they cover.
        teacher: int64 ``[m]``, the teacher's.
        groups: the groups, counted within these rows.
    """

    student: Tensor
    teacher: Tensor
    groups: TokenGroups


def group_chunks(
    groups: TokenGroups, row_bytes: tuple[int, int], block_bytes: int, chunk_bytes: int
) -> Iterator[list[GroupBlock]]:
    """Chunks of blocks of whole groups, in order.

    Args:
        groups: all groups.
        row_bytes: of a row of the student's logits, and of the teacher's.
        block_bytes: limit of both models' logits of a block, exceeded only by a single group.
        chunk_bytes: limit of both models' logits of a chunk, exceeded only by a single block.
    """
    ours, theirs = groups.student.tolist(), groups.teacher.tolist()
    sizes = [(b - a) * row_bytes[0] + (d - c) * row_bytes[1] for (a, b), (c, d) in zip(ours, theirs, strict=True)]
    blocks = _packed(sizes, block_bytes)
    for chunk in _packed([sum(sizes[block]) for block in blocks], chunk_bytes):
        yield [_block(groups, ours[block], theirs[block]) for block in blocks[chunk]]


def _packed(sizes: Sequence[int], limit: int) -> list[slice]:
    """Neighbours put together up to a limit of their sizes' sum."""
    cuts, total = [0], 0
    for i, size in enumerate(sizes):
        if i > cuts[-1] and total + size > limit:
            cuts.append(i)
            total = 0
        total += size
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True) if a < b]


def _block(groups: TokenGroups, ours: list[list[int]], theirs: list[list[int]]) -> GroupBlock:
    device = groups.student.device
    (student, mine), (teacher, other) = (_closed_up(spans, device) for spans in (ours, theirs))
    return GroupBlock(student, teacher, TokenGroups(mine, other, groups.teacher_targets[teacher]))


def _closed_up(spans: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows that spans cover, and the spans as they are when those rows stand alone."""
    rows = [row for a, b in spans for row in range(a, b)]
    lengths = torch.tensor([b - a for a, b in spans])
    stops = lengths.cumsum(0)
    return torch.tensor(rows, device=device), torch.stack([stops - lengths, stops], 1).to(device)
