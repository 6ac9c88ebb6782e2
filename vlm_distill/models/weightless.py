"""Models without weights: shapes and dtypes but no values, to plan a run before paying for it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_LOG = logging.getLogger("torch._subclasses.fake_tensor")
P = ParamSpec("P")

_on: ContextVar[bool] = ContextVar("weightless", default=False)


def weightless() -> bool:
    """Return whether models are being built without weights."""
    return _on.get()


def needs_weights(function: Callable[P, None]) -> Callable[P, None]:
    """Decorate a function that reads or checks weights, or asks a server: without weights it does nothing."""

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        if not weightless():
            function(*args, **kwargs)

    return checked


class _Fake(FakeTensorMode):
    """PyTorch's own mode, which without this looks for a GPU driver at every operation if there is none."""

    def __init__(self) -> None:
        self._no_device = super().avoid_device_init
        super().__init__()

    @property
    def avoid_device_init(self) -> bool:
        return self._no_device

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # tensors carry their mode; those of a copied model must mix with the others


class Weightless(TorchDispatchMode):
    """Context manager: inside it, parameters of new modules are fake, and so is everything computed from them.

    What depends on no parameter (token ids, masks, image grids) is computed as usual, since models read these values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = _Fake()

    def __enter__(self) -> Self:
        from transformers import PreTrainedModel
        from transformers.initialization import no_init_weights

        self._token = _on.set(True)
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        # torch itself does this when it copies a fake parameter.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        # It logs what it cannot do before it raises the same.
        _LOG.disabled = True
        self._uninitialised = no_init_weights()
        self._uninitialised.__enter__()
        # This also ties embeddings and output layer, which would be skipped otherwise.
        PreTrainedModel.init_weights = lambda model: model.tie_weights(recompute_mapping=False)  # type: ignore[method-assign]
        self._register = nn.Module.register_parameter
        register, fake = self._register, self.fake

        def register_fake(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None and not isinstance(parameter, FakeTensor):
                with torch.no_grad():
                    parameter = nn.Parameter(fake.from_tensor(parameter.detach()), parameter.requires_grad)
            register(module, name, parameter)

        nn.Module.register_parameter = register_fake  # type: ignore[method-assign,assignment]
        # Modules cast themselves by swapping parameters, which fake ones do not allow.
        self._apply, nn.Module._apply = nn.Module._apply, _apply  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._uninitialised.__exit__(None, None, None)
        self._quiet.__exit__(None, None, None)
        _LOG.disabled = False
        nn.Module.register_parameter = self._register  # type: ignore[method-assign]
        nn.Module._apply = self._apply  # type: ignore[method-assign]
        _on.reset(self._token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})[0]

    def compute(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
        """Return an operation's result, and whether it is fake."""
        given = list(tensors_in((args, kwargs)))
        known = [x for x in given if not isinstance(x, FakeTensor)]
        if len(known) == len(given):
            return func(*args, **kwargs), False
        if func is torch.ops.aten._grouped_mm.default:
            with self.fake:
                return _grouped(*args[:3]), True
        if known:
            if func in _INDEXED:
                args = (args[0], _as_indices(args[1]), *args[2:])
            args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs), True

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in an operation's arguments or results."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))


def _apply(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    for parameter in module.parameters(recurse):
        parameter.data = function(parameter.data)
    for owner in module.modules() if recurse else [module]:
        owner._buffers = {k: None if b is None else function(b) for k, b in owner._buffers.items()}
    return module


def _grouped(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return a grouped product's shape: rows times their expert's matrix. PyTorch can fake it in bf16 only."""
    sums = [len(offsets)] if a.ndim == b.ndim == 2 else []
    return a.new_empty(*sums, a.shape[-2], b.shape[-1])


def _as_indices(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Turn known masks into indices: how many entries of a fake mask are true would be unknown."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found
