"""One model's hidden states and head, from which logits are formed a few at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

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


class ModelSide:
    """A model's hidden states and head, detached, in the precision in which they are multiplied.

    Args:
        head: of the model.
        hidden: ``[N, H]``.
        weight: what the head's context yields.
        dtype: of the student's hidden states, which decides the precision for both models.
    """

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
