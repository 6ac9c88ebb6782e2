"""Sums of terms over rows whose gradient is made on the way: what the chunked engine and whole logits share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base import RowResult, Term


@dataclass
class TermSums:
    """One term of the loss over its rows, detached.

    Attributes:
        loss: 0-d, the sum of the rows' losses, neither weighted nor scaled.
        count: number of rows.
        signals: 0-d sums of the loss's ``signals``; all of them also where there was no row.
    """

    loss: Tensor
    count: int = 0
    signals: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class LossSums:
    """The differentiable weighted sum ``loss`` (0-d) and its terms by name."""

    loss: Tensor
    terms: dict[str, TermSums]


def check_terms(terms: Sequence[Term], **given: Any) -> None:
    """That there are terms, of different names, and what they need: ``given`` are ``teacher`` and ``targets``."""
    names = [term.name for term in terms]
    if not names:
        raise ValueError("the loss has no term")
    if len(set(names)) < len(names):
        raise ValueError(f"two terms of the loss share a name: {', '.join(names)}")
    for term in terms:
        for need, value in given.items():
            if need in term.loss.needs and value is None:
                raise ValueError(f"term {term.name!r} of the loss needs {need}, and None was given")


def check_same(what: str, student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(f"the student has {student} {what}, the teacher {teacher}")


class Sums:
    """The sums of every term, filled block by block.

    Args:
        terms: the summands.
        scales: a factor for each term's sum, by name; 1 where none is given.
        zero: 0-d, of the precision and on the device of the sums.
        grad: whether gradients are made.
    """

    def __init__(self, terms: Sequence[Term], scales: Mapping[str, float], zero: Tensor, *, grad: bool) -> None:
        # Terms with a teacher last, so that only they may need copies of its logits.
        self.terms = sorted(terms, key=lambda term: "teacher" in term.loss.needs)
        self.factors = {term.name: term.weight * scales.get(term.name, 1.0) for term in terms}
        self.sums = {t.name: TermSums(zero.clone(), 0, {s: zero.clone() for s in t.loss.signals}) for t in terms}
        self.learned: dict[str, list[Tensor]] = {}
        self.grad = grad

    def expect_learned(self, learned: Mapping[str, Sequence[Tensor]], dtype: torch.dtype) -> None:
        """Makes room for the gradients of what the losses learn themselves."""
        self.learned = {name: [torch.zeros_like(v, dtype=dtype) for v in vs] for name, vs in learned.items()}

    def total(self) -> Tensor:
        """0-d, the weighted sum of all terms."""
        return torch.stack([self.factors[name] * sums.loss for name, sums in self.sums.items()]).sum()

    def add_block(
        self,
        terms: Sequence[Term],
        student: Tensor,
        teacher: Tensor | None,
        evaluate: Callable[[Term, Tensor, Tensor | None, bool], RowResult],
    ) -> None:
        """Adds a block's sums; leaves the gradient of the weighted sum where the student's logits were.

        Args:
            terms: those that see the block.
            student: ``[n, V]``, overwritten.
            teacher: ``[m, V']`` or ``None``; overwritten.
            evaluate: a term on logits that it may overwrite, with or without the gradient.
        """
        gradients: list[tuple[Tensor, float]] = []
        for position, term in enumerate(terms, 1):
            # `rows` overwrites what it is given, so only the last term gets the logits themselves.
            last = position == len(terms)
            factor = self.factors[term.name]
            other = teacher if "teacher" in term.loss.needs else None
            if not last:
                other = None if other is None else other.clone()
            grad = self.grad and factor != 0.0
            result = evaluate(term, student if last else student.clone(), other, grad)
            sums = self.sums[term.name]
            sums.loss += result.loss.sum()
            sums.count += len(result.loss)
            for name, values in result.signals.items():
                sums.signals[name] += values.sum()
            if result.grad is not None:
                gradients.append((result.grad, factor))
            for total, gradient in zip(self.learned[term.name], result.learned, strict=False):  # none where not grad
                total.add_(gradient, alpha=factor)
        if not self.grad:
            return
        # Backwards: the last gradient may lie in the student's buffer, which is written first.
        student.zero_() if not gradients else torch.mul(*gradients.pop(), out=student)
        for gradient, factor in gradients:
            student.add_(gradient, alpha=factor)


def with_gradients(total: Tensor, made: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Tensor:
    """``total`` hung into the graph of its inputs, whose gradients ``made`` are known beforehand."""
    gradients = [
        None if gradient is None or x is None else _cast(gradient, x.dtype)
        for gradient, x in zip(made, inputs, strict=True)
    ]
    return _WithGradients.apply(total, gradients, *inputs)


def _cast(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    # A gradient in float16 would underflow here: its loss scale arrives only with the backward pass.
    return gradient if dtype == torch.float16 else gradient.to(dtype)


class _WithGradients(torch.autograd.Function):
    """A number whose gradients by its inputs are known beforehand."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (None, None, *(None if d is None else (d * outer).to(dtype) for d, dtype in pairs))
