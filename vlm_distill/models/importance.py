"""Importance: measure what layers, neurons, heads and channels do on samples, to choose what a student keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .plain_layers import PlainStack


class Importance:
    """Sums over the tokens (or patches) of all samples that run through a stack of layers inside :meth:`watching`.

    Nothing of a forward is kept but these sums, so that memory is that of one forward.

    Args:
        stack: the layers.
        widths: whether neurons, heads and channels are measured, too; only plain layers can be.
    """

    def __init__(self, stack: PlainStack, *, widths: bool) -> None:
        self.stack = stack
        self.plain = stack.plain if widths else None
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._tokens: dict[tuple[str, int], int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure every forward inside."""
        handles = []
        for index, layer in enumerate(self.stack.layers):
            handles.append(layer.register_forward_hook(partial(self._see_layer, index), with_kwargs=True))
            if self.plain is not None:
                for name, kind in self._read_by():
                    handles.append(layer.get_submodule(name).register_forward_pre_hook(self._see(kind, index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read_by(self) -> Iterator[tuple[str, str]]:
        """Yield the linear layers whose inputs are measured, and what these are."""
        assert self.plain is not None
        yield self.plain.mlp_out, "neurons"
        yield self.plain.attention_out, "heads"
        yield self.plain.queries[0], "attention"
        yield self.plain.mlp_in[0], "mlp"

    def _see(self, kind: str, index: int) -> Callable[[nn.Module, Any], None]:
        def see(module: nn.Module, given: Any) -> None:
            self._add((kind, index), given[0].detach().abs())

        return see

    def _see_layer(self, index: int, module: nn.Module, given: Any, named: Any, output: Any) -> None:
        before = given[0] if given else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosine = F.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1)
        self._add(("layers", index), 1 - cosine.unsqueeze(-1))

    def _add(self, key: tuple[str, int], values: Tensor) -> None:
        """Add ``values [..., C]``, one row a token."""
        rows = values.reshape(-1, values.shape[-1])
        total = rows.sum(0, dtype=torch.float64).cpu()
        self._sums[key] = self._sums[key] + total if key in self._sums else total
        self._tokens[key] = self._tokens.get(key, 0) + len(rows)

    @property
    def seen(self) -> bool:
        """Whether anything ran through the layers."""
        return bool(self._sums)

    def _mean(self, kind: str, index: int) -> Tensor:
        return self._sums[kind, index] / self._tokens[kind, index]

    @property
    def layers(self) -> list[float]:
        """Each layer's influence: 1 − the mean cosine of its input and output (Men et al. 2024, Block Influence)."""
        return [float(self._mean("layers", i)) for i in range(len(self.stack))]

    def neurons(self, layer: int) -> Tensor:
        """Return the mean absolute activation of a layer's MLP neurons, ``[neurons]``."""
        return self._mean("neurons", layer)

    def groups(self, layer: int) -> Tensor:
        """Return the mean absolute output of a layer's heads, before their projection, summed by group ``[groups]``."""
        return self._mean("heads", layer).reshape(self.stack.groups, -1).mean(1)

    @property
    def channels(self) -> Tensor:
        """The mean absolute value ``[width]`` of what attention and MLP read, summed over all layers.

        This is after the layers' norms, as in Minitron (Muralidharan et al. 2024).
        """
        read = [self._mean(kind, i) for kind in ("attention", "mlp") for i in range(len(self.stack))]
        return torch.stack(read).sum(0)
