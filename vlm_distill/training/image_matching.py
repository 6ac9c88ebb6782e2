"""Pair the image tokens of two models that have different numbers of them: by their logits, or by averaging grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from data.batch import DistillationBatch
from data.errors import UserError
from vlm_distill.losses import HiddenTargets, Match
from vlm_distill.losses.feature_distances import average_down
from vlm_distill.losses.heads import Head, ModelSide

#: Bytes of both models' logits for some tokens of the vocabulary.
_LOGIT_BYTES = 1 << 26


class ImageMatching:
    """Pairs of image tokens of a micro-batch, image by image (or tile by tile); all terms of one kind share them.

    Args:
        batch: with both models' numbers of tokens for each block.
        hidden: the student's last hidden states ``[T, H]`` at its image tokens.
        head: the student's.
        teacher: the teacher's last hidden states at its image tokens, and its head.
    """

    def __init__(self, batch: DistillationBatch, hidden: Tensor, head: Head, teacher: HiddenTargets) -> None:
        assert batch.teacher is not None
        self._batch, self._hidden, self._head, self._teacher = batch, hidden, head, teacher
        self._blocks = list(zip(batch.student.image_blocks.tolist(), batch.teacher.image_blocks.tolist(), strict=True))

    def hidden_states(self, match: Match) -> tuple[Tensor, HiddenTargets]:
        """Return both models' last hidden states of the pairs, the teacher's with its head."""
        theirs = self.teacher(match, self._teacher.hidden)
        return self.student(match, self._hidden), HiddenTargets(theirs, self._teacher.head)

    def by_image(self, name: str, role: Literal["student", "teacher"], features: Tensor) -> Tensor:
        """Return a model's features of whole images, ``[images, tokens, width]``, for the pairs by their logits.

        Raises:
            UserError: the features are not those of the image tokens.
        """
        tokens, indices = (0, self.indices[0]) if role == "student" else (1, self.indices[1])
        if any(block[tokens] != features.shape[1] for block in self._blocks) or len(self._blocks) != len(features):
            raise UserError(
                f"loss {name}: the {role}'s {features.shape[1]} features an image are not its image tokens, which "
                "match: hungarian pairs; use match: pool"
            )
        pairs = len(indices) // max(1, len(features))
        return features.flatten(0, 1)[indices].view(len(features), pairs, features.shape[-1])

    def student(self, match: Match, features: Tensor) -> Tensor:
        """Return features of the student's image tokens, ``[T, width]``, for the P pairs: ``[P, width]``."""
        if match == "hungarian":
            return features[self.indices[0]]
        return features if match == "none" else self._pooled(features, 0)

    def teacher(self, match: Match, features: Tensor) -> Tensor:
        """Return features of the teacher's image tokens for the same pairs."""
        if match == "hungarian":
            return features[self.indices[1]]
        return features if match == "none" else self._pooled(features, 1)

    def samples(self, match: Match) -> Tensor:
        """Return int64 ``[P]``, ascending: the number of the sample that each pair belongs to."""
        samples = self._batch.student.image_samples
        if match == "hungarian":
            return samples[self.indices[0]]
        if match == "none":
            return samples
        blocks = self._batch.student.image_blocks
        return samples[blocks.cumsum(0) - blocks].repeat_interleave(self._batch.image_pairs)

    @cached_property
    def indices(self) -> tuple[Tensor, Tensor]:
        """Each model's indices of the pairs, int64 ``[P]``, that minimise the sum of the L1 distances of their logits.

        If a block has more tokens in one model, only as many as the other has are paired. The student's ascend.
        """
        from scipy.optimize import linear_sum_assignment

        device = self._hidden.device
        mine, theirs = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        starts = [0, 0]
        for costs in logit_distances(self._hidden, self._head, self._teacher, self._blocks):
            # NaN would be refused here, and is the losses' to report.
            rows, columns = linear_sum_assignment(costs.nan_to_num().double().cpu().numpy())
            mine.append(torch.from_numpy(rows) + starts[0])
            theirs.append(torch.from_numpy(columns) + starts[1])
            starts = [starts[0] + costs.shape[0], starts[1] + costs.shape[1]]
        return torch.cat(mine).to(device), torch.cat(theirs).to(device)

    def _pooled(self, features: Tensor, model: int) -> Tensor:
        """Return features averaged over the coarser of both models' grids, block by block."""
        found = []
        for tokens, block in zip(self._blocks, features.split([b[model] for b in self._blocks]), strict=True):
            side = math.isqrt(min(tokens))
            found.append(block if tokens[0] == tokens[1] else average_down(block.unsqueeze(0), side)[0])
        return torch.cat([features[:0], *found])


@torch.no_grad()
def logit_distances(
    hidden: Tensor, head: Head, teacher: HiddenTargets, blocks: Sequence[tuple[int, int]]
) -> Iterator[Tensor]:
    """Yield the L1 distances between two models' logits, ``[n, m]`` for each block of n and m tokens.

    The heads' weights are made whole even without a token: ranks gather sharded ones together.

    Args:
        hidden: the student's ``[T, H]``, the blocks one after the other.
        head: the student's.
        teacher: the same of the teacher.
        blocks: both models' numbers of tokens.
    """
    with (
        torch.autocast(hidden.device.type, enabled=False),
        head.weight() as weight,
        teacher.head.weight() as teacher_weight,
    ):
        mine = ModelSide(head, hidden, weight, hidden.dtype)
        theirs = ModelSide(teacher.head, teacher.hidden, teacher_weight, hidden.dtype)
        starts = [0, 0]
        for n, m in blocks:
            at = [
                torch.arange(start, start + count, device=hidden.device)
                for start, count in zip(starts, (n, m), strict=True)
            ]
            logits = _logits_of(mine, at[0]), _logits_of(theirs, at[1])
            yield _distances(*logits, (n, m), mine.vocabulary, hidden)
            starts = [starts[0] + n, starts[1] + m]


def _logits_of(side: ModelSide, positions: Tensor) -> Callable[[slice], Tensor]:
    """Return what computes the logits ``[n, v]`` of some positions for a tile of the vocabulary."""
    operands = side.operands(positions)

    def tile(tokens: slice) -> Tensor:
        out = torch.empty(len(operands), tokens.stop - tokens.start, dtype=side.dtype, device=operands.device)
        side.write_logits(operands, out, tokens)
        return out

    return tile


def _distances(
    student: Callable[[slice], Tensor],
    teacher: Callable[[slice], Tensor],
    shape: tuple[int, int],
    vocabulary: int,
    like: Tensor,
) -> Tensor:
    """Return L1 distances ``[n, m]``, a sum over tiles of the vocabulary."""
    costs = torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    size = max(1, _LOGIT_BYTES // (costs.itemsize * sum(shape)))
    for start in range(0, vocabulary, size):
        tokens = slice(start, min(vocabulary, start + size))
        costs += torch.cdist(student(tokens), teacher(tokens), p=1)
    return costs
