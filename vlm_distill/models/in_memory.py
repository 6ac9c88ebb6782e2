"""Models that a Python program has loaded, in place of a path: found by name, copied or borrowed, left as they were."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.errors import UserError
from data.in_memory import PREFIX

from .interface import VisionLanguageModel

# Values of each tensor that a digest reads.
_VALUES = 2**10


@dataclass(frozen=True)
class HeldModel:
    """A loaded model.

    Attributes:
        model: the program's own; it is never changed.
        trained: whether it will be trained, so that a copy is needed even in its own precision.
    """

    model: VisionLanguageModel
    trained: bool = False

    def take(self, dtype: torch.dtype) -> VisionLanguageModel:
        """Return the model in a precision: a copy on the CPU if it is trained or converted, else :func:`borrowed`."""
        if self.trained or self.model.dtype != dtype:
            return copy.deepcopy(self.model).to("cpu", dtype)
        return borrowed(self.model)


_held: dict[str, HeldModel] = {}


@contextmanager
def models_in_memory(models: Mapping[str, HeldModel]) -> Iterator[None]:
    """Context manager: inside it, a section's ``path`` can name these models, by names that begin with ``memory:``."""
    _held.update(models)
    try:
        yield
    finally:
        for name in models:
            _held.pop(name, None)


def held_model(name: str) -> HeldModel | None:
    """Return the model of a name; ``None`` for a path. Raise ``UserError`` if its program is gone."""
    if name in _held or not name.startswith(PREFIX):
        return _held.get(name)
    raise UserError(
        f"{name}: this model was in the memory of the Python program that began the run; call vlm_distill.distill "
        "there again, or name a model's folder"
    )


def borrowed(model: VisionLanguageModel) -> VisionLanguageModel:
    """Return a model with the same weights, whose processor and head can be set without changing the original's."""
    own = copy.copy(model)
    own.processor = copy.deepcopy(model.processor)
    own.head = copy.copy(model.head)
    return own


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Context manager: afterwards, the same parameters train as before, and modules are in the same mode."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, trains in trained.items():
            parameter.requires_grad_(trains)


def digest_weights(model: nn.Module) -> str:
    """Return a digest of a model's weights: of their names, shapes and some values of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_some_values(tensor))
    return digest.hexdigest()[:16]


def _some_values(tensor: Tensor) -> bytes:
    """Return evenly spaced values of a tensor as bytes."""
    flat = tensor.detach().flatten()
    some = flat[:: max(1, len(flat) // _VALUES)]
    return some.to("cpu", torch.float64).numpy().tobytes()
