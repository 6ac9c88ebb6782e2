"""Sums of terms over rows, with the gradient computed along the way; shared by ``fused_linear`` and ``on_logits``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base import RowResult, Term


@dataclass
class TermSums:
    """One term's sums over its rows, detached.

    Attributes:
        loss: 0-d, the sum of the rows' losses, without weight or scale.
        count: number of rows; of weighted rows the sum of the weights, 0-d float64.
        signals: 0-d sums of the loss's ``signals``; complete even without rows.
    """

    loss: Tensor
    count: float | Tensor = 0
    signals: dict[str, Tensor] = field(default_factory=dict)

    def times(self, weight: float) -> TermSums:
        """Return the sums of the same rows, each counted ``weight`` times."""
        return TermSums(weight * self.loss, weight * self.count, {k: weight * v for k, v in self.signals.items()})

    def plus(self, other: TermSums) -> TermSums:
        """Return these sums and those of further rows together."""
        signals = dict(self.signals)
        for name, value in other.signals.items():
            signals[name] = signals[name] + value if name in signals else value
        return TermSums(self.loss + other.loss, self.count + other.count, signals)


@dataclass
class LossSums:
    """The differentiable weighted sum ``loss`` (0-d) and its terms by name."""

    loss: Tensor
    terms: dict[str, TermSums]


def check_terms(terms: Sequence[Term], **given: Any) -> None:
    """Raise ``ValueError`` without terms, if two share a name, or if one needs what was not given.

    Args:
        terms: of the loss.
        given: ``teacher`` and ``targets``, or ``None`` for either.
    """
    names = [term.name for term in terms]
    if not names:
        raise ValueError("the loss has no term")
    if len(set(names)) < len(names):
        raise ValueError(f"two terms of the loss share a name: {', '.join(names)}")
    for term in terms:
        for need, value in given.items():
            if need in term.loss.needs and value is None:
                raise ValueError(f"term {term.name!r} of the loss needs {need}, and None was given")


def separate(
    terms: Sequence[Term], student: Tensor, teacher: Tensor | None
) -> Iterator[tuple[Term, Tensor, Tensor | None]]:
    """Yield each term with logits that it may overwrite: copies, and for the last term the originals."""
    for position, term in enumerate(terms, 1):
        other = teacher if term.has_teacher else None
        if position == len(terms):
            yield term, student, other
        else:
            yield term, student.clone(), None if other is None else other.clone()


def check_same(what: str, student: int, teacher: int) -> None:
    """Raise ``ValueError`` if the models' numbers differ."""
    if student != teacher:
        raise ValueError(f"the student has {student} {what}, the teacher {teacher}")


class Sums:
    """The sums of every term, filled block by block.

    Args:
        terms: the summands.
        scales: a factor for each term's sum, by name; 1 for the others.
        zero: 0-d, with the precision and device of the sums.
        grad: whether to compute gradients.
    """

    def __init__(self, terms: Sequence[Term], scales: Mapping[str, float], zero: Tensor, *, grad: bool) -> None:
        # Terms with a teacher come last, so that only they need copies of its logits.
        self.terms = sorted(terms, key=lambda term: term.has_teacher)
        self.factors = {term.name: term.weight * scales.get(term.name, 1.0) for term in terms}
        self.sums = {}
        for term in terms:
            signals = {name: zero.clone() for name in term.loss.signals}
            self.sums[term.name] = TermSums(zero.clone(), 0, signals)
        self.learned: dict[str, list[Tensor]] = {}
        self.grad = grad

    def expect_learned(self, learned: Mapping[str, Sequence[Tensor]], dtype: torch.dtype) -> None:
        """Allocate the gradients of the losses' own parameters, given what each term's ``learned_tensors`` returned."""
        for name, tensors in learned.items():
            self.learned[name] = [torch.zeros_like(tensor, dtype=dtype) for tensor in tensors]

    def learned_gradients(self) -> list[Tensor]:
        """Return the gradients of the losses' own parameters, term by term."""
        found: list[Tensor] = []
        for gradients in self.learned.values():
            found.extend(gradients)
        return found

    def total(self) -> Tensor:
        """Return the weighted sum of all terms, 0-d."""
        return torch.stack([self.factors[name] * sums.loss for name, sums in self.sums.items()]).sum()

    def trains(self, term: Term) -> bool:
        """Return whether the gradient of a term is needed."""
        return self.grad and self.factors[term.name] != 0.0

    def add(
        self, terms: Sequence[Term], results: Sequence[RowResult], student: Tensor, weights: Tensor | None = None
    ) -> None:
        """Add what the terms gave for a block; write the gradient of their weighted sum over the student's logits.

        Args:
            terms: the terms that see the block.
            results: of each of them; the last gradient may occupy the student's memory.
            student: ``[n, V]``.
            weights: factors on the results' rows; the gradient is left without them.
        """
        gradients: list[tuple[Tensor, float]] = []
        for term, result in zip(terms, results, strict=True):
            self.add_rows(term, result.loss, result.signals, weights)
            # Empty without a gradient.
            for total, gradient in zip(self.learned[term.name], result.learned, strict=False):
                total.add_(gradient, alpha=self.factors[term.name])
            if result.grad is not None:
                gradients.append((result.grad, self.factors[term.name]))
        if not self.grad:
            return
        # The last gradient may occupy the student's buffer, so that one is written first.
        student.zero_() if not gradients else torch.mul(*gradients.pop(), out=student)
        for gradient, factor in gradients:
            student.add_(gradient, alpha=factor)

    def add_rows(self, term: Term, loss: Tensor, signals: Mapping[str, Tensor], weights: Tensor | None) -> None:
        """Add the losses ``[n]`` of a block, and its signals, times the rows' weights."""
        sums = self.sums[term.name]
        if weights is not None:
            loss = loss * weights
            signals = {name: values * weights for name, values in signals.items()}
        sums.loss += loss.sum()
        sums.count += len(loss) if weights is None else weights.sum()
        for name, values in signals.items():
            sums.signals[name] += values.sum()


def with_gradients(total: Tensor, made: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> Tensor:
    """Return ``total`` as a function of its inputs, whose gradients ``made`` are already known."""
    gradients = [
        None if gradient is None or x is None else _cast(gradient, x.dtype)
        for gradient, x in zip(made, inputs, strict=True)
    ]
    return _WithGradients.apply(total, gradients, *inputs)


def _cast(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    # float16 would underflow here: its loss scale arrives only with the backward pass.
    return gradient if dtype == torch.float16 else gradient.to(dtype)


class _WithGradients(torch.autograd.Function):
    """A number whose gradients by its inputs are already known; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        # The loss is often the whole objective: then nothing is scaled. On a GPU, asking would wait for the device.
        if outer.device.type == "cpu" and outer.item() == 1.0:
            return (None, None, *(None if d is None else d.to(dtype) for d, dtype in pairs))
        return (None, None, *(None if d is None else (d * outer).to(dtype) for d, dtype in pairs))
