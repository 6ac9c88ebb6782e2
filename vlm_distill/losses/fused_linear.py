"""A weighted sum of losses straight from hidden states: the logits exist for a few rows at a time.

The rows go through both heads in chunks, large enough for efficient matrix products, and through the losses in blocks
of a chunk, small enough to stay in a processor's cache. The gradients by the hidden states, the head's weight and its
bias are made on the way (Liger Kernel's scheme: three matrix products for the student and one for the teacher, none
repeated); the backward pass only scales them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult, Term, need_targets
from .groups import TokenGroups, group_chunks
from .sums import LossSums, Sums, check_same, check_terms, with_gradients
from .tiles import Tiles
from .topk import SCRATCH as TOPK_SCRATCH
from .topk import TopKTargets, topk_rows

# Bytes of all [rows, V] buffers of a chunk, and of one such buffer of a block. On a CPU a block should stay in the
# cache, and some hundred rows already give the matrix products their full speed (docs/losses.md has the measurement);
# on other devices a block has to be large enough to fill the device and hide the launches.
CHUNK_BYTES_CPU, BLOCK_BYTES_CPU = 2**27, 2**21
CHUNK_BYTES, BLOCK_BYTES = 2**30, 2**26


class Head(Protocol):
    """What is read of an ``LMHead``: logits = softcap(scale·(hidden Wᵀ + bias)), softcap(z) = c·tanh(z/c)."""

    scale: float
    softcap: float | None

    def weight(self) -> AbstractContextManager[Tensor]:
        """A context that yields the weight ``[V, H]``, a differentiable view of the parameter."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """``[V]`` or ``None``; read inside the weight's context."""
        ...


@dataclass
class HiddenTargets:
    """What a teacher gives: hidden states ``[N, H]`` of its own width, and its head."""

    hidden: Tensor
    head: Head

    def __getitem__(self, rows: slice) -> HiddenTargets:
        return HiddenTargets(self.hidden[rows], self.head)


# Loops over chunks and sums in place gain nothing from torch.compile, and its default backend gets them wrong.
@torch.compiler.disable
def fused_linear(
    terms: Sequence[Term] | DistillationLoss,
    student_hidden: Tensor,
    student_head: Head,
    teacher: HiddenTargets | TopKTargets | None = None,
    targets: Tensor | None = None,
    *,
    distilled: Tensor | None = None,
    groups: TokenGroups | None = None,
    scales: Mapping[str, float] | None = None,
    chunk_bytes: int | None = None,
    recompute: bool = False,
) -> LossSums:
    """Sums of losses over rows of hidden states, with the gradient already made.

    Logits are formed in float32, in float64 where the student's hidden states are float64. Gradients accumulate in that
    precision and are cast to their parameter's once. With bfloat16 on a GPU the matrix products read bfloat16 and write
    float32; otherwise 16-bit weights are first converted to float32 as a whole, beyond ``chunk_bytes``.
    No work is done for gradients while they are switched off, nor for a head or hidden states that need none.

    Args:
        terms: the summands; a lone loss counts as a term called "loss".
        student_hidden: ``[N, H]``, at the positions that predict supervised tokens; N may be 0.
        student_head: its weight's context is open during the whole call.
        teacher: hidden states at the same N positions and their head, or the likeliest tokens there; may be ``None`` if
            no term needs a teacher.
        targets: int64 ``[N]``, the tokens to predict; may be ``None`` if no term needs them.
        distilled: bool ``[N]``, the rows that terms with a teacher see (default: all). Other terms see every row.
        groups: of the student's N and the teacher's M rows, in place of ``distilled`` where tokenizers differ.
        scales: a factor for each term's sum, by name; 1 where none is given.
        chunk_bytes: limit of the ``[rows, V]`` buffers alive at once, exceeded only where one row or group needs more.
            Default: 128 MiB on a CPU, 1 GiB elsewhere; with ``recompute`` 4 MiB and 1 GiB.
        recompute: form the logits in tiles of tokens × vocabulary, once for the losses and again for the gradient, so
            that memory beside the gradients depends on neither number; two products more, or four where a loss compares
            with a mixture. Only for losses with a ``streamed`` form, not for top-k teachers nor for groups.

    Returns:
        ``loss`` = Σ over terms of weight · scale · sum over its rows. It hangs in the graph also when N is 0, so that
        the head and the hidden states get (zero) gradients. There are no second derivatives.

    Raises:
        ValueError: no terms, two of one name, one that needs a teacher or targets where there are none, more of the
            teacher than its likeliest tokens, whole rows of logits with ``recompute``, or rows in pairs where there are
            groups; or teacher and student differ in rows or vocabulary.
    """
    if isinstance(terms, DistillationLoss):
        terms = [Term("loss", terms)]
    _check(terms, teacher, targets, groups, recompute)
    if not any("teacher" in term.loss.needs for term in terms):
        teacher = None
    recording = torch.is_grad_enabled()
    with (
        torch.autocast(student_hidden.device.type, enabled=False),
        student_head.weight() as weight,
        teacher.head.weight() if isinstance(teacher, HiddenTargets) else nullcontext() as teacher_weight,
    ):
        learned = {term.name: term.loss.learned() for term in terms}
        inputs = (
            student_hidden,
            weight,
            student_head.bias,
            *(value for values in learned.values() for value in values),
        )
        with torch.no_grad():
            student = _Side(student_head, student_hidden, weight, student_hidden.dtype)
            other: _Side | TopKTargets | None = None
            if isinstance(teacher, HiddenTargets):
                assert teacher_weight is not None
                other = _Side(teacher.head, teacher.hidden, teacher_weight, student.dtype)
                if groups is None:
                    check_same("rows", len(student_hidden), len(teacher.hidden))
                if not all(term.loss.takes_groups for term in terms if "teacher" in term.loss.needs):
                    check_same("tokens in the vocabulary", len(weight), len(teacher_weight))
            elif teacher is not None:
                other = teacher
                check_same("rows", len(student_hidden), len(teacher.ids))
            wanted = [recording and x is not None and x.requires_grad for x in inputs]
            work = _Pass(terms, scales or {}, student, other, targets, wanted, chunk_bytes, recompute)
            work.expect_learned(learned, student.dtype)
            work.run(distilled, groups)
            total = work.total()
            made = [*work.gradients, *(value for values in work.learned.values() for value in values)]
        if any(wanted):
            total = with_gradients(total, made, inputs)
    return LossSums(total, work.sums)


def _check(
    terms: Sequence[Term],
    teacher: HiddenTargets | TopKTargets | None,
    targets: Tensor | None,
    groups: TokenGroups | None,
    recompute: bool,
) -> None:
    check_terms(terms, teacher=teacher, targets=targets)
    for term in terms:
        if isinstance(teacher, TopKTargets) and "teacher" in term.loss.needs and not term.loss.takes_topk:
            raise ValueError(
                f"term {term.name!r} of the loss needs the teacher's whole distribution, not its top tokens"
            )
        if groups is not None and "teacher" in term.loss.needs:
            if not term.loss.takes_groups:
                raise ValueError(f"term {term.name!r} of the loss compares token by token, and groups were given")
            need_targets(targets)
        if recompute and term.loss.streamed() is None:
            raise ValueError(f"term {term.name!r} of the loss needs whole rows of logits, which recompute never forms")
    if recompute and isinstance(teacher, TopKTargets):
        raise ValueError("recompute needs the teacher's hidden states, not its top tokens")


class _Side:
    """One model's hidden states and head, and the precision in which they are multiplied."""

    def __init__(self, head: Head, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # bfloat16 operands with a float32 result. Not float16: the logits' gradients would underflow in it.
        mixed = hidden.is_cuda and hidden.dtype == torch.bfloat16
        self.operand = torch.bfloat16 if mixed else self.dtype
        self.output: dict[str, Any] = {"out_dtype": torch.float32} if mixed else {}
        self.hidden = hidden.detach()
        self.weight = weight.detach().to(self.operand)
        self.bias = None if head.bias is None else head.bias.detach().to(self.dtype)
        self.scale, self.softcap = head.scale, head.softcap

    def logits_(self, hidden: Tensor, out: Tensor, tile: slice = slice(None)) -> None:
        """Logits of ``hidden [n, H]`` for the ``v`` tokens of a tile into ``out [n, v]``."""
        torch.mm(hidden, self.weight[tile].t(), **self.output, out=out)
        if self.bias is not None:
            out.add_(self.bias[tile])
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """The soft-cap's derivative, from its value; ``None`` without a soft-cap."""
        return None if self.softcap is None else 1.0 - (logits / self.softcap).square_()


class _Pass(Sums):
    """One pass over all rows: the sums of every term, and the gradients that are wanted."""

    def __init__(
        self,
        terms: Sequence[Term],
        scales: Mapping[str, float],
        student: _Side,
        teacher: _Side | TopKTargets | None,
        targets: Tensor | None,
        wanted: Sequence[bool],
        chunk_bytes: int | None,
        recompute: bool,
    ) -> None:
        zero = torch.zeros((), dtype=student.dtype, device=student.hidden.device)
        super().__init__(terms, scales, zero, grad=any(wanted))
        self.student, self.teacher, self.targets, self.recompute = student, teacher, targets, recompute
        self.teacher_side = teacher if isinstance(teacher, _Side) else None
        shapes = (student.hidden.shape, student.weight.shape, student.weight.shape[:1])
        self.gradients = [zero.new_zeros(s) if want else None for s, want in zip(shapes, wanted[:3], strict=True)]
        self.on_cpu = zero.device.type == "cpu"
        self.chunk_bytes = chunk_bytes  # as asked for; tiles have other defaults

    def run(self, distilled: Tensor | None, groups: TokenGroups | None) -> None:
        device, count = self.student.hidden.device, len(self.student.hidden)
        if isinstance(self.teacher, _Side) and groups is not None:
            distilled = self._groups(groups, self.teacher)
            self._rows((~distilled).nonzero().squeeze(1), [t for t in self.terms if "teacher" not in t.loss.needs])
        elif self.teacher is None or distilled is None:
            self._rows(torch.arange(count, device=device), self.terms)
        else:
            self._rows(distilled.nonzero().squeeze(1), self.terms)
            self._rows((~distilled).nonzero().squeeze(1), [t for t in self.terms if "teacher" not in t.loss.needs])

    def _rows(self, rows: Tensor, terms: Sequence[Term]) -> None:
        """Those terms on those rows, chunk by chunk."""
        if not len(rows) or not terms:
            return
        # A GPU takes the kernels wherever they know every loss; a CPU is faster in small blocks of whole rows.
        known = all(term.loss.streamed() is not None for term in terms) and not isinstance(self.teacher, TopKTargets)
        if self.recompute or (known and not self.on_cpu):
            Tiles(self, terms, len(rows), recompute=self.recompute).run(rows)
            return
        chunk_bytes, block_bytes = self._limits()
        teacher = self.teacher if any("teacher" in term.loss.needs for term in terms) else None
        vocabulary = len(self.student.weight)
        row_bytes = vocabulary * self.student.dtype.itemsize
        buffers = self._buffers(terms, TOPK_SCRATCH if isinstance(teacher, TopKTargets) else 0)
        block = max(1, min(block_bytes, chunk_bytes // (2 * buffers)) // row_bytes)
        whole = teacher if isinstance(teacher, _Side) else None
        kept = 1 if whole is None else 2
        chunk = max(1, (chunk_bytes // row_bytes - block * buffers) // kept)
        chunk = min(chunk, len(rows))

        student_logits = self.student.weight.new_empty(chunk, vocabulary, dtype=self.student.dtype)
        teacher_logits = None if whole is None else student_logits.new_empty(chunk, len(whole.weight))
        for index in rows.split(chunk):
            hidden = self.student.hidden[index].to(self.student.operand)
            z = student_logits[: len(index)]
            self.student.logits_(hidden, z)
            if whole is not None and teacher_logits is not None:
                whole.logits_(whole.hidden[index].to(whole.operand), teacher_logits[: len(index)])
            for i in range(0, len(index), block):
                part = slice(i, min(i + block, len(index)))
                targets = None if self.targets is None else self.targets[index[part]]
                top = None
                if isinstance(teacher, TopKTargets):
                    top = teacher.ids[index[part]], teacher.categories(index[part], z.dtype)
                self._block(terms, z[part], None if teacher_logits is None else teacher_logits[part], targets, top)
            if self.grad:
                self._accumulate(index, hidden, z)

    def _limits(self) -> tuple[int, int]:
        """Bytes of a chunk's buffers, and of one buffer of a block."""
        chunk_bytes = self.chunk_bytes or (CHUNK_BYTES_CPU if self.on_cpu else CHUNK_BYTES)
        return chunk_bytes, BLOCK_BYTES_CPU if self.on_cpu else BLOCK_BYTES

    def _buffers(self, terms: Sequence[Term], least: int = 0) -> int:
        """Buffers ``[rows, V]`` of a block.

        A term's scratch, its copies of the logits if others follow, every term's gradient, the soft-cap's slope.
        """
        scratch = max(least, *(term.loss.scratch for term in terms))
        return scratch + (2 if len(terms) > 1 else 0) + len(terms) + (self.student.softcap is not None)

    def _groups(self, groups: TokenGroups, teacher: _Side) -> Tensor:
        """All terms on the rows of the groups; returns which rows those are, bool ``[N]``."""
        itemsize = self.student.dtype.itemsize
        student_bytes, teacher_bytes = len(self.student.weight) * itemsize, len(teacher.weight) * itemsize
        buffers, (chunk_bytes, block_bytes) = self._buffers(self.terms), self._limits()
        block = min(block_bytes, chunk_bytes // (2 * buffers))
        limits = 2 * block, chunk_bytes - block * buffers
        seen = torch.zeros(len(self.student.hidden), dtype=torch.bool, device=self.student.hidden.device)
        for blocks in group_chunks(groups, (student_bytes, teacher_bytes), *limits):
            index, others = (torch.cat(rows) for rows in zip(*((b.student, b.teacher) for b in blocks), strict=True))
            seen[index] = True
            hidden = self.student.hidden[index].to(self.student.operand)
            z = hidden.new_empty(len(index), len(self.student.weight), dtype=self.student.dtype)
            self.student.logits_(hidden, z)
            teacher_logits = z.new_empty(len(others), len(teacher.weight))
            teacher.logits_(teacher.hidden[others].to(teacher.operand), teacher_logits)
            ours = z.split([len(b.student) for b in blocks])
            theirs = teacher_logits.split([len(b.teacher) for b in blocks])
            for part, mine, other in zip(blocks, ours, theirs, strict=True):
                targets = None if self.targets is None else self.targets[part.student]
                self._block(self.terms, mine, other, targets, None, part.groups)
            if self.grad:
                self._accumulate(index, hidden, z)
        return seen

    def _block(
        self,
        terms: Sequence[Term],
        student: Tensor,
        teacher: Tensor | None,
        targets: Tensor | None,
        top: tuple[Tensor, Tensor] | None,
        groups: TokenGroups | None = None,
    ) -> None:
        """Adds a block's sums; leaves the gradient of the weighted sum where the student's logits were."""
        slope = self.student.slope(student) if self.grad else None

        def evaluate(term: Term, own: Tensor, other: Tensor | None, grad: bool) -> RowResult:
            if "teacher" in term.loss.needs and top is not None:
                return topk_rows(term.loss, own, *top, grad=grad)
            if other is not None and groups is not None:
                return term.loss.grouped(own, other, need_targets(targets), groups, grad=grad)
            return term.loss.loss_and_grad(own, other, targets, grad=grad)

        self.add_block(terms, student, teacher, evaluate)
        if slope is not None:
            student.mul_(slope)

    def _accumulate(self, index: Tensor, hidden: Tensor, grad: Tensor) -> None:
        """A chunk's share of the gradients, from the operand ``hidden [n, H]`` and ``grad [n, V]`` by its logits."""
        side = self.student
        d_hidden, d_weight, d_bias = self.gradients
        if side.scale != 1.0:
            grad.mul_(side.scale)
        if d_bias is not None:
            d_bias += grad.sum(0)
        operand = grad.to(side.operand)
        if d_hidden is not None:
            d_hidden[index] = torch.mm(operand, side.weight, **side.output)
        if d_weight is not None:
            torch.addmm(d_weight, operand.t(), hidden, **side.output, out=d_weight)
