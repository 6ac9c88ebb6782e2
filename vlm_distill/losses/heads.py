"""One model's hidden states and head, from which logits are formed a few at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


class Head(Protocol):
    """The output layer as the losses read it: logits = softcap(scale·(hidden Wᵀ + bias)), softcap(z) = c·tanh(z/c)."""

    scale: float
    softcap: float | None

    def weight(self) -> AbstractContextManager[Tensor]:
        """Context manager: yields the weight ``[V, H]``, a differentiable view of the parameter."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """``[V]`` or ``None``; read inside the weight's context."""
        ...


@dataclass
class HiddenTargets:
    """A teacher's outputs in full: hidden states ``[N, H]`` of its own width, and its head."""

    hidden: Tensor
    head: Head

    def __getitem__(self, rows: slice) -> HiddenTargets:
        return HiddenTargets(self.hidden[rows], self.head)


@dataclass
class MixedTargets:
    """Several teachers' outputs at the same N positions, combined into one distribution over their one vocabulary.

    Attributes:
        parts: the outputs of each teacher.
        weights: of each teacher; they sum to 1.
        combine: ``probabilities``: Σ w·p; ``logits``: the softmax of Σ w·z, a geometric mean.
    """

    parts: Sequence[HiddenTargets]
    weights: Sequence[float]
    combine: Literal["probabilities", "logits"]

    def __getitem__(self, rows: slice) -> MixedTargets:
        return MixedTargets([part[rows] for part in self.parts], self.weights, self.combine)


class ModelSide:
    """A model's hidden states and head, detached, in the precision in which they are multiplied.

    Args:
        head: of the model.
        hidden: ``[N, H]``.
        weight: what the head's context yields.
        dtype: of the student's hidden states, which decides the precision for both models.
    """

    #: Buffers of logits that :meth:`write_logits` fills at once, its result among them.
    buffers = 1

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

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the head scores."""
        return len(self.weight)

    def operands(self, positions: Tensor | slice) -> Tensor:
        """Return the hidden states at some positions, as the matrix products read them."""
        if isinstance(positions, slice):
            return self.hidden[positions].to(self.operand)
        # On a CPU index_select copies rows whole; self.hidden[positions] takes three times as long.
        return self.hidden.index_select(0, positions).to(self.operand)

    def write_logits(self, operands: Tensor, out: Tensor, tile: slice = slice(None)) -> None:
        """Write the logits of ``operands [n, H]`` for the ``v`` tokens of a tile into ``out [n, v]``."""
        torch.mm(operands, self.weight[tile].t(), **self.output, out=out)
        if self.bias is not None:
            out.add_(self.bias[tile])
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def softcap_slope(self, logits: Tensor) -> Tensor | None:
        """Return the derivative of the soft-cap, computed from its value; ``None`` without a soft-cap."""
        return None if self.softcap is None else 1.0 - (logits / self.softcap).square_()


class MixedSide(ModelSide):
    """Several teachers that look like one, whose logits are the logarithm of the mixture (up to a constant).

    Args:
        sides: of the teachers, over the same positions and tokens.
        weights, combine: as in :class:`MixedTargets`.
    """

    buffers = 2

    def __init__(
        self, sides: Sequence[ModelSide], weights: Sequence[float], combine: Literal["probabilities", "logits"]
    ) -> None:
        self.sides, self.weights, self.combine = sides, weights, combine
        self.dtype = sides[0].dtype

    def __len__(self) -> int:
        return len(self.sides[0])

    @property
    def vocabulary(self) -> int:
        return self.sides[0].vocabulary

    def operands(self, positions: Tensor | slice) -> Tensor:
        """Return the hidden states of all teachers side by side, ``[n, H₁ + H₂ + …]``."""
        return torch.cat([side.operands(positions).to(self.dtype) for side in self.sides], 1)

    def write_logits(self, operands: Tensor, out: Tensor, tile: slice = slice(None)) -> None:
        """Write the mixture's logits. Probabilities are mixed over whole rows alone, not over a tile of them."""
        own = out.new_empty(out.shape)
        parts = operands.split([side.hidden.shape[1] for side in self.sides], 1)
        out.fill_(0.0 if self.combine == "logits" else -torch.inf)
        for side, weight, part in zip(self.sides, self.weights, parts, strict=True):
            side.write_logits(part.to(side.operand), own, tile)
            if self.combine == "logits":
                out.add_(own, alpha=weight)
            else:
                own.sub_(own.logsumexp(-1, keepdim=True)).add_(math.log(weight))
                torch.logaddexp(out, own, out=out)
