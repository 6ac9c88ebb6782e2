"""Losses with a kernel form, from tiles of positions × vocabulary: no row of logits has to exist whole.

A block of positions goes over the vocabulary tile by tile: once for the statistics of every term, once more for the
sums of terms that compare with a mixture, and once for the gradient, whose products with hidden states and weights are
taken at once. A tile still in memory from the previous pass is not formed again, so passes alternate in direction; if
the whole vocabulary is one tile, nothing is computed twice.

Suffixes give the dimensions of a tensor: N positions of a chunk (several blocks, whose gradients wait for one product),
n positions of a block, v tokens of a tile, w the tile's width with padding, H the width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .base import Term
from .fused_sums import FusedSums
from .heads import ModelSide
from .kernels import RowStatistics

# Most positions of a tile, and bytes of all buffers of its size. On a CPU a tile should stay in the cache; a GPU needs
# products large enough to fill it, and few passes over the gradient of the head.
TOKENS_CPU, TILE_BYTES_CPU = 256, 2**22
TOKENS, TILE_BYTES = 4096, 2**30
# Columns and rows of a tile are multiples of these where possible: matrix units work on whole squares.
COLUMNS, ROWS = 128, 128
# So is the width of the buffers: a vocabulary may be odd, and a GPU reads several aligned numbers at once. The padding
# is −∞ in both models, which adds nothing, and is left out of the products.
WIDTH_CPU, WIDTH = 1, 64
# Most buffers of a tile that the torch kernels hold at once.
TORCH_SCRATCH = 7


class Tiles:
    """Adds some terms on some positions to the sums of a call.

    Args:
        work: the models, and the sums and gradients that are added to.
        terms: the terms to compute, with the same weights of rows; all have a ``kernel_form``.
        count: number of positions.
        recompute: whether the vocabulary may be cut into tiles; if not, the gradients of several blocks (a chunk) wait
            for products of their own.
    """

    def __init__(self, work: FusedSums, terms: Sequence[Term], count: int, *, recompute: bool) -> None:
        self.work, self.terms = work, terms
        self.row_weights = terms[0].row_weights
        self.student = work.student
        self.teacher: ModelSide | None = None
        if isinstance(work.teacher, ModelSide) and any(term.has_teacher for term in terms):
            self.teacher = work.teacher
        self.trained = [term for term in terms if work.grad and work.factors[term.name] != 0.0]
        # Gradients are rounded once: several terms of 16-bit models are added up in a float32 buffer first.
        adding = len(self.trained) > 1 and self.student.operand != self.student.dtype
        self._plan(count, adding, recompute)

        # Allocate the buffers of a tile.
        width = _round_up(self.columns, self.width)
        self.student_nw = self.student.weight.new_empty(self.tokens, width, dtype=self.student.dtype)
        self.teacher_nw = None if self.teacher is None else torch.empty_like(self.student_nw)
        self.summed_nw = torch.empty_like(self.student_nw) if adding else None
        self.gradient_Nw = self.student.weight.new_empty(self.chunk if self.trained else 0, width)
        self.formed: int | None = None  # first token of the tile whose logits are in the buffers

    def _plan(self, count: int, adding: bool, recompute: bool) -> None:
        """Choose the numbers of positions of a block and a chunk, and of tokens of a tile."""
        on_cpu, vocabulary = self.work.on_cpu, self.student.vocabulary
        limit = self.work.chunk_bytes or (TILE_BYTES_CPU if on_cpu else TILE_BYTES)
        # Bytes of a logit and everything of its size, and of its rounded gradient.
        buffers = 1 + (0 if self.teacher is None else self.teacher.buffers) + adding + TORCH_SCRATCH * on_cpu
        formed = self.student.dtype.itemsize * buffers
        kept = self.student.operand.itemsize if self.trained else 0
        self.width = WIDTH_CPU if on_cpu else WIDTH
        if recompute:
            most = limit // ((formed + kept) * COLUMNS)
            self.tokens = self.chunk = max(1, min(count, TOKENS_CPU if on_cpu else TOKENS, most))
            self.columns = min(vocabulary, _round_down(limit // (self.tokens * (formed + kept)), COLUMNS))
            return
        # Half of the memory goes to logits. The other half lets the head's gradient, which is larger than a block's
        # logits, be read and written for several blocks at once.
        self.columns = vocabulary
        self.tokens = min(count, _round_down(limit // (2 if kept else 1) // (formed * vocabulary), ROWS))
        self.chunk = self.tokens
        if kept:
            left = limit - self.tokens * formed * vocabulary
            self.chunk = max(1, left // (kept * vocabulary * self.tokens)) * self.tokens
        self.chunk = min(self.chunk, count)

    def run(self, positions: Tensor) -> None:
        """Add the terms on these positions, chunk by chunk."""
        gradient = self.work.d_hidden if self.trained else None
        for index_N in positions.split(self.chunk):
            hidden_NH = self.student.operands(index_N)
            d_hidden_NH = None if gradient is None else gradient.new_zeros(hidden_NH.shape)
            for start in range(0, len(index_N), self.tokens):
                stop = min(start + self.tokens, len(index_N))
                _Block(self, index_N, slice(start, stop), hidden_NH, d_hidden_NH).run()
            if gradient is not None and d_hidden_NH is not None:
                gradient.index_add_(0, index_N, d_hidden_NH)

    def tiles(self) -> list[slice]:
        """Return the vocabulary's tiles in order."""
        vocabulary = self.student.vocabulary
        starts = range(0, vocabulary, self.columns)
        return [slice(start, min(start + self.columns, vocabulary)) for start in starts]

    def add_sums(self, term: Term, statistics: RowStatistics, weights: Tensor | None) -> None:
        """Add a block's loss and signals to a term's sums."""
        known = statistics.signals()
        signals = {name: known[name] for name in term.loss.signals}
        self.work.add_rows(term, statistics.loss(), signals, weights)


class _Block:
    """One block's passes over the vocabulary.

    Args:
        engine: sizes, buffers and models.
        index_N: positions of the chunk.
        part: the block within the chunk.
        hidden_NH: the chunk's hidden states as operands.
        d_hidden_NH: their gradient so far, or ``None`` if it is not wanted.
    """

    def __init__(
        self, engine: Tiles, index_N: Tensor, part: slice, hidden_NH: Tensor, d_hidden_NH: Tensor | None
    ) -> None:
        self.engine, self.part = engine, part
        self.hidden_NH, self.d_hidden_NH = hidden_NH, d_hidden_NH
        index_n = index_N[part]
        self.count = len(index_n)
        self.is_last = part.stop == len(index_N)
        self.student_nH = hidden_NH[part]
        self.teacher_nH = None if engine.teacher is None else engine.teacher.operands(index_n)
        self.targets_n = engine.work.targets_at(index_n)
        self.weights_n = None if engine.row_weights is None else engine.row_weights[index_n]
        self.tiles = engine.tiles()
        self.statistics: dict[str, RowStatistics] = {}
        engine.formed = None

    def run(self) -> None:
        """Add the block's sums, and the chunk's gradients if this is its last block."""
        # First pass: statistics of every term.
        for term in self.engine.terms:
            form = term.loss.kernel_form()
            assert form is not None
            self.statistics[term.name] = RowStatistics(form, self.count, self.engine.student_nw)
        for tile, student_nw, teacher_nw in self._pass():
            for statistics in self.statistics.values():
                statistics.accumulate(student_nw, teacher_nw, self._targets_in(tile))
        for statistics in self.statistics.values():
            statistics.finalize()

        # Second pass, backwards: sums that need the normalisers.
        mixed = [statistics for statistics in self.statistics.values() if statistics.form.mixed]
        if mixed:
            self.tiles.reverse()
            for _, student_nw, teacher_nw in self._pass():
                for statistics in mixed:
                    statistics.accumulate_mixture(student_nw, teacher_nw)
        for term in self.engine.terms:
            self.engine.add_sums(term, self.statistics[term.name], self.weights_n)

        # Last pass, in the other direction again: gradients.
        if self.engine.trained:
            self.tiles.reverse()
            for tile, student_nw, teacher_nw in self._pass():
                self._write_gradient(tile, student_nw, teacher_nw)
                if self.is_last:
                    self._accumulate(tile)

    def _pass(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield each tile with both models' logits, padded with −∞; the student's twice if no term has a teacher."""
        engine = self.engine
        for tile in self.tiles:
            v = tile.stop - tile.start
            w = _round_up(v, engine.width)
            student_nw = engine.student_nw[: self.count, :w]
            teacher_nw = student_nw if engine.teacher_nw is None else engine.teacher_nw[: self.count, :w]
            if engine.formed != tile.start:
                engine.student.write_logits(self.student_nH, student_nw[:, :v], tile)
                if engine.teacher is not None and self.teacher_nH is not None:
                    engine.teacher.write_logits(self.teacher_nH, teacher_nw[:, :v], tile)
                if w > v:
                    student_nw[:, v:] = teacher_nw[:, v:] = -torch.inf
                engine.formed = tile.start
            yield tile, student_nw, teacher_nw

    def _targets_in(self, tile: slice) -> Tensor | None:
        """Return the targets counted from a tile's first token."""
        return None if self.targets_n is None else self.targets_n - tile.start

    def _write_gradient(self, tile: slice, student_nw: Tensor, teacher_nw: Tensor) -> None:
        """Write the gradient by a tile's logits into the block's rows of the chunk's buffer."""
        engine = self.engine
        own_nw = engine.gradient_Nw[self.part, : student_nw.shape[1]]
        out_nw = own_nw if engine.summed_nw is None else engine.summed_nw[: self.count, : student_nw.shape[1]]
        for number, term in enumerate(engine.trained):
            self.statistics[term.name].gradient(
                student_nw,
                teacher_nw,
                out_nw,
                self._targets_in(tile),
                scale=engine.work.factors[term.name] * engine.student.scale,
                softcap=engine.student.softcap,
                add=number > 0,
            )
        if self.weights_n is not None:
            out_nw.mul_(self.weights_n.to(out_nw.dtype).unsqueeze(1))
        if out_nw is not own_nw:
            own_nw.copy_(out_nw)

    def _accumulate(self, tile: slice) -> None:
        """Add a tile's share of the gradients of head and hidden states, for all blocks of the chunk at once."""
        side = self.engine.student
        gradient_Nv = self.engine.gradient_Nw[: self.part.stop, : tile.stop - tile.start]
        d_weight, d_bias = self.engine.work.d_weight, self.engine.work.d_bias
        if d_bias is not None:
            d_bias[tile] += gradient_Nv.sum(0, dtype=d_bias.dtype)
        if self.d_hidden_NH is not None:
            torch.addmm(self.d_hidden_NH, gradient_Nv, side.weight[tile], **side.output, out=self.d_hidden_NH)
        if d_weight is not None:
            d_tile_vH = d_weight[tile]
            torch.addmm(d_tile_vH, gradient_Nv.t(), self.hidden_NH, **side.output, out=d_tile_vH)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _round_down(size: int, multiple: int) -> int:
    """Round down to a multiple, if ``size`` holds one; at least 1."""
    return max(1, size // multiple * multiple if size >= multiple else size)
