"""A model's weights under the names that they have in its files."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from .adapters import plain_state
from .composed import ComposedVLM
from .interface import VisionLanguageModel


def saved_tensors(model: VisionLanguageModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors that ``save_pretrained`` of a model of Transformers writes, by their names in the file.

    LoRA adapters are merged, and tied weights are there once.

    Args:
        model: not assembled from parts, except a decoder alone.
        state: its weights, if its own are sharded over ranks.
    """
    composed = isinstance(model, ComposedVLM)
    prefix = "decoder." if composed else "model."
    transformer: Any = model.decoder if composed else model.model
    ignored = set(transformer._keys_to_ignore_on_save or ())
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for key, tensor in plain_state(model, state).items():
        name, place = key.removeprefix(prefix), (tensor.data_ptr(), tuple(tensor.shape))
        if name in ignored or place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor
    return dict(revert_weight_conversion(transformer, tensors))
