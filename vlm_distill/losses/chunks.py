"""Losses from whole rows of logits, a few rows at a time.

A chunk of positions goes through both heads, large enough for efficient matrix products; its logits go through the
losses in blocks, small enough to stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Term
from .fused_sums import FusedSums
from .groups import TokenGroups, group_chunks
from .heads import ModelSide
from .softmax import need_targets
from .sums import separate
from .token_targets import TokenTargets
from .topk import SCRATCH as TOPK_SCRATCH
from .topk import TopKTargets, topk_loss_and_grad

# Bytes of all [rows, V] buffers of a chunk, and of one such buffer of a block. On a CPU a block should stay in the
# cache, and some hundred rows already give the matrix products their full speed (docs/losses.md has the measurement);
# on other devices a block has to be large enough to fill the device and hide the launches.
CHUNK_BYTES_CPU, BLOCK_BYTES_CPU = 2**27, 2**19
CHUNK_BYTES, BLOCK_BYTES = 2**30, 2**26


class Chunks:
    """Adds some terms on some positions to the sums of a call.

    Args:
        work: the models, and the sums and gradients that are added to.
        terms: the terms to compute, with the same weights of rows.
    """

    def __init__(self, work: FusedSums, terms: Sequence[Term]) -> None:
        self.work, self.terms = work, terms
        self.row_weights = terms[0].row_weights if terms else None
        self.student = work.student
        self.teacher = work.teacher if any(term.has_teacher for term in terms) else None
        self.chunk_bytes = work.chunk_bytes or (CHUNK_BYTES_CPU if work.on_cpu else CHUNK_BYTES)
        self.block_bytes = BLOCK_BYTES_CPU if work.on_cpu else BLOCK_BYTES
        # Buffers [rows, V] of a block: a term's scratch, its copies of the logits if other terms follow, every term's
        # gradient, and the soft-cap's slope.
        least = TOPK_SCRATCH if isinstance(self.teacher, TopKTargets) else 0
        copies = 2 if len(terms) > 1 else 0
        scratch = max(least, *(term.loss.scratch for term in terms))
        self.buffers = scratch + copies + len(terms) + (self.student.softcap is not None)

    def run(self, positions: Tensor) -> None:
        """Add the terms on these positions, chunk by chunk."""
        row_bytes = self.student.vocabulary * self.student.dtype.itemsize
        block = max(1, min(self.block_bytes, self.chunk_bytes // (2 * self.buffers)) // row_bytes)
        kept = 1 + (self.teacher.buffers if isinstance(self.teacher, ModelSide) else 0)  # logits of both models
        chunk = max(1, (self.chunk_bytes // row_bytes - block * self.buffers) // kept)
        chunk = min(chunk, len(positions))

        student_buffer = self.student.weight.new_empty(chunk, self.student.vocabulary, dtype=self.student.dtype)
        teacher_buffer = None
        if isinstance(self.teacher, ModelSide):
            teacher_buffer = student_buffer.new_empty(chunk, self.teacher.vocabulary)
        for index in positions.split(chunk):
            where = _as_slice(index) if self.work.on_cpu else index
            operands = self.student.operands(where)
            student_logits = student_buffer[: len(index)]
            self.student.write_logits(operands, student_logits)
            teacher_logits = None
            if isinstance(self.teacher, ModelSide) and teacher_buffer is not None:
                teacher_logits = teacher_buffer[: len(index)]
                self.teacher.write_logits(self.teacher.operands(where), teacher_logits)
            elif isinstance(self.teacher, TokenTargets):
                teacher_logits = self.teacher.logprobs[index]
            for start in range(0, len(index), block):
                part = slice(start, min(start + block, len(index)))
                self._add_block(
                    index[part], student_logits[part], None if teacher_logits is None else teacher_logits[part]
                )
            if self.work.grad:
                self._accumulate(where, operands, student_logits)

    def _add_block(
        self, index: Tensor, student: Tensor, teacher: Tensor | None, groups: TokenGroups | None = None
    ) -> None:
        """Add a block's sums; leave the gradient of their weighted sum where the student's logits were.

        Args:
            index: the block's positions of the student.
            student: ``[n, V]``.
            teacher: ``[n, V]``; ``[n]``, log-probabilities of the tokens, if the teacher gives no more; or ``None`` if
                it gives its likeliest tokens or nothing. With groups, its m rows.
            groups: over the n and m rows, if groups of tokens are compared.
        """
        targets = self.work.targets_at(index)
        top = None
        if isinstance(self.teacher, TopKTargets):
            top = self.teacher.ids[index], self.teacher.log_probs(index, student.dtype)
        slope = self.student.softcap_slope(student) if self.work.grad else None
        results = []
        for term, own, other in separate(self.terms, student, teacher):
            grad, loss = self.work.trains(term), term.loss.at(index)
            if term.has_teacher and top is not None:
                results.append(topk_loss_and_grad(loss, own, *top, grad=grad))
            elif other is not None and isinstance(self.teacher, TokenTargets):
                results.append(loss.token_loss_and_grad(own, other, need_targets(targets), groups, grad=grad))
            elif other is not None and groups is not None:
                results.append(loss.grouped_loss_and_grad(own, other, need_targets(targets), groups, grad=grad))
            else:
                results.append(loss.loss_and_grad(own, other, targets, grad=grad))
            del own, other  # before the next term's copies are made
        weights = self.row_weights
        if weights is not None:
            weights = weights[index if groups is None else index[groups.student[:, 0]]]
        self.work.add(self.terms, results, student, weights)
        if slope is not None:
            student.mul_(slope)

    def run_groups(self, groups: TokenGroups) -> Tensor:
        """Add the terms on the groups' positions, chunk by chunk; return a mask of these positions, bool ``[N]``."""
        assert isinstance(self.teacher, ModelSide | TokenTargets)
        itemsize = self.student.dtype.itemsize
        width = self.teacher.vocabulary if isinstance(self.teacher, ModelSide) else 1
        row_bytes = self.student.vocabulary * itemsize, width * itemsize
        block = min(self.block_bytes, self.chunk_bytes // (2 * self.buffers))
        limits = 2 * block, self.chunk_bytes - block * self.buffers
        seen = torch.zeros(len(self.student), dtype=torch.bool, device=self.student.hidden.device)
        for blocks in group_chunks(groups, row_bytes, *limits):
            index = torch.cat([block.student for block in blocks])
            teacher_index = torch.cat([block.teacher for block in blocks])
            seen[index] = True
            # Form both models' logits of the chunk, which differ in rows and width.
            operands = self.student.operands(index)
            student_logits = operands.new_empty(len(index), self.student.vocabulary, dtype=self.student.dtype)
            self.student.write_logits(operands, student_logits)
            if isinstance(self.teacher, TokenTargets):
                teacher_logits = self.teacher.logprobs[teacher_index]
            else:
                teacher_logits = student_logits.new_empty(len(teacher_index), width)
                self.teacher.write_logits(self.teacher.operands(teacher_index), teacher_logits)
            # Compare them block by block.
            student_parts = student_logits.split([len(block.student) for block in blocks])
            teacher_parts = teacher_logits.split([len(block.teacher) for block in blocks])
            for part, student, teacher in zip(blocks, student_parts, teacher_parts, strict=True):
                self._add_block(part.student, student, teacher, part.groups)
            if self.work.grad:
                self._accumulate(index, operands, student_logits)
        return seen

    def _accumulate(self, where: Tensor | slice, operands: Tensor, grad: Tensor) -> None:
        """Add a chunk's share of the gradients; terms with other weights may have added theirs at the same positions.

        Args:
            where: the chunk's positions.
            operands: ``[n, H]``, its hidden states.
            grad: ``[n, V]``, the gradient by its logits; overwritten.
        """
        side = self.student
        d_hidden, d_bias = self.work.d_hidden, self.work.d_bias
        if self.row_weights is not None:
            grad.mul_(self.row_weights[where].to(grad.dtype).unsqueeze(1))
        if side.scale != 1.0:
            grad.mul_(side.scale)
        if d_bias is not None:
            d_bias += grad.sum(0)
        operand = grad.to(side.operand)
        if d_hidden is not None:
            if isinstance(where, slice):
                rows = d_hidden[where]
                torch.addmm(rows, operand, side.weight, **side.output, out=rows)
            else:
                d_hidden.index_add_(0, where, torch.mm(operand, side.weight, **side.output))
        self.work.add_weight_gradient(operand, operands)


def _as_slice(positions: Tensor) -> Tensor | slice:
    """Return ascending positions as a slice if none is left out, so that rows need not be copied."""
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions
