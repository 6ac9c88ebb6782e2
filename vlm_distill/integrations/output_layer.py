"""The output layer of any language model of Transformers: take its input, learn what the model does to its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# In place of logits: what a model makes of these numbers shows its scale (by the smallest) and its soft-cap (by the
# largest); the others check that it does nothing else.
_PROBES = (2.0**-20, 1.0, 2.0**5, 2.0**10, 2.0**40)
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Shaping:
    """What a model does to the output of its lm head: softcap(scale · z) with softcap(z) = c·tanh(z/c)."""

    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(logits: Tensor) -> Shaping:
        """Return the shaping by which a model has turned the probes of :func:`intercepted` into ``logits [..., 5]``.

        Raises:
            ValueError: it did something else.
        """
        found = logits.reshape(-1, logits.shape[-1])[0].double().tolist()
        if len(found) == len(_PROBES):
            scale = found[0] / _PROBES[0]
            linear = _is_close(scale * _PROBES[-1], found[-1])
            shaping = Shaping(scale, None if linear else found[-1])
            expected = [shaping(probe) for probe in _PROBES]
            if all(map(_is_close, expected, found)):
                return shaping
        raise ValueError("the model changes its logits by more than a scale and a soft-cap; losses cannot follow that")

    def __call__(self, z: float) -> float:
        return self.scale * z if self.softcap is None else self.softcap * math.tanh(self.scale * z / self.softcap)


def _is_close(expected: float, found: float) -> bool:
    return math.isclose(expected, found, rel_tol=_TOLERANCE)


class OutputLayer:
    """An lm head as the losses read it.

    Args:
        linear: the layer.
        shaping: what its model does to its output.
        vocabulary: number of tokens that are compared, the first ones.
    """

    def __init__(self, linear: nn.Linear, shaping: Shaping, vocabulary: int) -> None:
        self._linear, self.vocabulary = linear, vocabulary
        self.scale, self.softcap = shaping.scale, shaping.softcap

    @contextmanager
    def weight(self) -> Iterator[Tensor]:
        """Give the weight ``[V, H]``."""
        yield self._linear.weight[: self.vocabulary]

    @property
    def bias(self) -> Tensor | None:
        """``[V]`` or ``None``."""
        return None if self._linear.bias is None else self._linear.bias[: self.vocabulary]


def output_linear(model: Any, role: str) -> nn.Linear:
    """Return a model's output layer.

    Args:
        model: of Transformers, without wrappers for training.
        role: for messages.

    Raises:
        ValueError: it has none, or one with adapters around it.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"{role}: the output layer of a {type(model).__name__} is a {type(linear).__name__}, and the losses need a "
            "torch.nn.Linear; leave lm_head out of the layers that adapters change"
        )
    return linear


@contextmanager
def intercepted(linear: nn.Linear, take: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Context manager: inside it, an output layer hands its input to ``take`` and returns a few numbers as logits.

    The layer is still called as a module, so that whatever gathers sharded parameters around a module's call does so.

    Args:
        linear: the layer.
        take: receives the hidden states ``[B, L, H]``. The logits depend on the tensor that it returns, without having
            its value: what finds unused parameters by following a model's outputs must see it.
    """

    def forward(hidden: Tensor) -> Tensor:
        taken = take(hidden)
        precise = torch.float32 if hidden.device.type == "mps" else torch.float64
        logits = torch.tensor(_PROBES, dtype=precise, device=hidden.device).expand(*hidden.shape[:-1], len(_PROBES))
        return logits if taken is None else logits + 0.0 * taken

    own = vars(linear)
    before = own.get("forward")  # set where a library has wrapped it
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before
