"""The losses of the kernels' family from tiles of tokens × vocabulary: no row of logits has to exist whole.

A block of tokens goes over the vocabulary tile by tile: once for the statistics of every term, once more for the sums
of terms that compare with a mixture, and once for the gradient, whose products with hidden states and weights are taken
at once. Tiles that lie in memory from the pass before are not formed again; so passes go back and forth, and where the
whole vocabulary is one tile nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Term
from .kernels import RowStatistics

if TYPE_CHECKING:
    from .fused_linear import _Pass

# Most tokens of a tile, and bytes of all buffers of its size. On a CPU a tile should stay in the cache; a GPU needs
# products large enough to fill it, and few passes over the gradient of the head.
TOKENS_CPU, TILE_BYTES_CPU = 256, 2**22
TOKENS, TILE_BYTES = 4096, 2**30
# A tile's columns and rows are multiples of these where they can be: matrix units work on whole squares.
COLUMNS, ROWS = 128, 128
# So is the width of the buffers, for a vocabulary may be odd and a GPU reads several aligned numbers at once. What lies
# beyond the tile is −∞ in both models, which adds nothing, and is left out of the products.
WIDTH_CPU, WIDTH = 1, 64
# Buffers of a tile that the kernels' torch twin holds at its peak.
TWIN_SCRATCH = 7


class Tiles:
    """One pass of some terms over some rows.

    Args:
        work: the models, sums, gradients and factors.
        terms: all of which have a ``streamed`` form.
        count: the number of rows.
        recompute: whether the vocabulary may be cut; if not, several blocks' gradients wait for products of their own.
    """

    def __init__(self, work: _Pass, terms: Sequence[Term], count: int, *, recompute: bool) -> None:
        self.work, self.terms = work, terms
        self.side = side = work.student
        self.teacher = work.teacher_side if any("teacher" in term.loss.needs for term in terms) else None
        self.pulling = [term for term in terms if work.grad and work.factors[term.name] != 0.0]
        # The gradients' sum is rounded once: several terms of 16-bit models add up in a buffer of their own.
        adding = len(self.pulling) > 1 and side.operand != side.dtype
        size, vocabulary = side.dtype.itemsize, len(side.weight)
        on_cpu = side.hidden.device.type == "cpu"
        formed = size * (1 + (self.teacher is not None) + adding + TWIN_SCRATCH * on_cpu)
        kept = side.operand.itemsize * bool(self.pulling)
        limit = work.chunk_bytes or (TILE_BYTES_CPU if on_cpu else TILE_BYTES)
        if recompute:
            most = limit // ((formed + kept) * COLUMNS)
            self.tokens = self.group = max(1, min(count, TOKENS_CPU if on_cpu else TOKENS, most))
            self.columns = min(vocabulary, _whole(limit // (self.tokens * (formed + kept)), COLUMNS))
        else:
            # Half of the memory for logits; the other half lets the head's gradient, which is larger than a block's
            # logits, be read and written for several blocks at once.
            self.columns = vocabulary
            self.tokens = min(count, _whole(limit // (2 if kept else 1) // (formed * vocabulary), ROWS))
            left = limit - self.tokens * formed * vocabulary
            self.group = max(1, left // (kept * vocabulary * self.tokens)) * self.tokens if kept else self.tokens
            self.group = min(self.group, count)
        self.width = WIDTH_CPU if on_cpu else WIDTH
        stride = _up(self.columns, self.width)
        self.student_logits = side.weight.new_empty(self.tokens, stride, dtype=side.dtype)
        self.teacher_logits = None if self.teacher is None else torch.empty_like(self.student_logits)
        self.summed = torch.empty_like(self.student_logits) if adding else None
        self.operand = side.weight.new_empty(self.group if kept else 0, stride)
        self.formed: int | None = None

    def run(self, rows: Tensor) -> None:
        for group in rows.split(self.group):
            hidden = self.side.hidden[group].to(self.side.operand)
            d_hidden = None
            if self.pulling and self.work.gradients[0] is not None:
                d_hidden = self.work.gradients[0].new_zeros(hidden.shape)
            for start in range(0, len(group), self.tokens):
                self._block(group, slice(start, min(start + self.tokens, len(group))), hidden, d_hidden)
            if d_hidden is not None and self.work.gradients[0] is not None:
                self.work.gradients[0][group] = d_hidden

    def _block(self, group: Tensor, block: slice, hidden: Tensor, d_hidden: Tensor | None) -> None:
        """The sums of a block of a group, and the gradients of the group if it is its last."""
        index, operand = group[block], hidden[block]
        teacher_operand = None if self.teacher is None else self.teacher.hidden[index].to(self.teacher.operand)
        targets = None if self.work.targets is None else self.work.targets[index]
        self.formed = None
        tiles = [
            slice(start, min(start + self.columns, len(self.side.weight)))
            for start in range(0, len(self.side.weight), self.columns)
        ]
        statistics = {}
        for term in self.terms:
            form = term.loss.streamed()
            assert form is not None
            statistics[term.name] = RowStatistics(form, len(index), self.student_logits)

        for tile in tiles:
            student, teacher = self._logits(operand, teacher_operand, tile)
            for term in self.terms:
                statistics[term.name].gather(student, teacher, None if targets is None else targets - tile.start)
        for rows in statistics.values():
            rows.settle()
        mixed = [rows for rows in statistics.values() if rows.form.mixed]
        if mixed:
            tiles.reverse()
            for tile in tiles:
                student, teacher = self._logits(operand, teacher_operand, tile)
                for rows in mixed:
                    rows.mix(student, teacher)
        for term in self.terms:
            self._add(term, statistics[term.name])

        tiles.reverse()
        for tile in tiles if self.pulling else ():
            student, teacher = self._logits(operand, teacher_operand, tile)
            own = self.operand[block, : student.shape[1]]
            grad = self.operand[: len(group), : tile.stop - tile.start]
            out = own if self.summed is None else self.summed[: len(index), : student.shape[1]]
            for number, term in enumerate(self.pulling):
                statistics[term.name].gradient(
                    student,
                    teacher,
                    out,
                    None if targets is None else targets - tile.start,
                    scale=self.work.factors[term.name] * self.side.scale,
                    softcap=self.side.softcap,
                    add=number > 0,
                )
            if out is not own:
                own.copy_(out)
            if block.stop == len(group):
                self._accumulate(tile, hidden, grad, d_hidden)

    def _logits(self, operand: Tensor, teacher_operand: Tensor | None, tile: slice) -> tuple[Tensor, Tensor]:
        """Both models' logits of a tile, widened by −∞; the student's twice if no term reads the teacher's."""
        n, v = len(operand), tile.stop - tile.start
        wide = _up(v, self.width)
        student = self.student_logits[:n, :wide]
        teacher = student if self.teacher_logits is None else self.teacher_logits[:n, :wide]
        if self.formed != tile.start:
            self.side.logits_(operand, student[:, :v], tile)
            if self.teacher is not None and teacher_operand is not None:
                self.teacher.logits_(teacher_operand, teacher[:, :v], tile)
            if wide > v:
                student[:, v:] = teacher[:, v:] = -torch.inf
            self.formed = tile.start
        return student, teacher

    def _add(self, term: Term, rows: RowStatistics) -> None:
        sums, measured = self.work.sums[term.name], rows.signals()
        loss = rows.loss()
        sums.loss += loss.sum()
        sums.count += len(loss)
        for name in term.loss.signals:
            sums.signals[name] += measured[name].sum()

    def _accumulate(self, tile: slice, hidden: Tensor, grad: Tensor, d_hidden: Tensor | None) -> None:
        """A tile's share of the gradients, from the operands ``hidden [n, H]`` and ``grad [n, v]`` by its logits."""
        side = self.side
        _, d_weight, d_bias = self.work.gradients
        if d_bias is not None:
            d_bias[tile] += grad.sum(0, dtype=d_bias.dtype)
        if d_hidden is not None:
            torch.addmm(d_hidden, grad, side.weight[tile], **side.output, out=d_hidden)
        if d_weight is not None:
            own = d_weight[tile]
            torch.addmm(own, grad.t(), hidden, **side.output, out=own)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _whole(size: int, multiple: int) -> int:
    """``size`` rounded down to a multiple where it holds one; at least 1."""
    return max(1, size // multiple * multiple if size >= multiple else size)
