"""Groups of rows taken in pieces: chunks for the matrix products, each of some blocks for the losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import Groups


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
    groups: Groups


def group_chunks(
    groups: Groups, row_bytes: tuple[int, int], block_bytes: int, chunk_bytes: int
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


def _block(groups: Groups, ours: list[list[int]], theirs: list[list[int]]) -> GroupBlock:
    device = groups.student.device
    (student, mine), (teacher, other) = (_closed_up(spans, device) for spans in (ours, theirs))
    return GroupBlock(student, teacher, Groups(mine, other, groups.teacher_targets[teacher]))


def _closed_up(spans: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows that spans cover, and the spans as they are when those rows stand alone."""
    rows = [row for a, b in spans for row in range(a, b)]
    lengths = torch.tensor([b - a for a, b in spans])
    stops = lengths.cumsum(0)
    return torch.tensor(rows, device=device), torch.stack([stops - lengths, stops], 1).to(device)
