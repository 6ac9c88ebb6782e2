"""Cut students from their teachers, and count parameters by part."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from data.errors import UserError

from .composed import ComposedVLM
from .decoder_features import decoder_layers
from .interface import VisionLanguageModel
from .lm_head import lm_head
from .pretrained import PretrainedVLM


def spaced_layers(count: int, total: int) -> list[int]:
    """Return ``count`` of ``total`` layers, maximally spaced, first and last included (Shleifer & Rush 2020)."""
    if count == 1:
        return [0]
    steps = count - 1
    return [(2 * i * (total - 1) + steps) // (2 * steps) for i in range(count)]


def keep_layers(model: VisionLanguageModel, layers: int | list[int]) -> VisionLanguageModel:
    """Return a copy of ``model`` with only some of its decoder layers; everything else is copied whole.

    Args:
        model: unchanged.
        layers: which layers, ascending; or how many, evenly spaced with the first and the last included.

    Raises:
        UserError: a number or an index that the decoder does not have.
    """
    body = model.decoder.base_model if isinstance(model, ComposedVLM) else _text_model(model)
    stack, name = _layers(body)
    total = len(stack)
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise UserError(f"from_teacher.layers: {layers} layers asked of a decoder with {total}; give 1 to {total}")
        layers = spaced_layers(layers, total)
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= total:
        raise UserError(f"from_teacher.layers: {layers} must be ascending indices from 0 to {total - 1}")

    dropped = [layer for i, layer in enumerate(stack) if i not in layers]
    # In the memo, so that dropped layers are never copied and the processor is shared.
    memo: dict[int, Any] = {id(layer): nn.Identity() for layer in dropped}
    memo[id(model.processor)] = model.processor
    memo[id(model.head)] = model.head
    student = copy.deepcopy(model, memo)
    if isinstance(student, ComposedVLM):
        body, student.head = student.decoder.base_model, lm_head(student.decoder)
    else:
        assert isinstance(student, PretrainedVLM)
        body, student.head = _text_model(student), lm_head(student.model)
    kept = nn.ModuleList(getattr(body, name)[i] for i in layers)
    setattr(body, name, kept)
    for index, layer in enumerate(kept):
        modules: Iterator[Any] = layer.modules()
        for module in modules:
            if hasattr(module, "layer_idx"):  # the layer's index in the key-value cache
                module.layer_idx = index
    whole = student.decoder if isinstance(student, ComposedVLM) else student.model
    for config in {id(c): c for c in (body.config, whole.config.get_text_config())}.values():
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == total:  # one entry a layer, such as layer_types
                setattr(config, key, [value[i] for i in layers])
        config.num_hidden_layers = len(layers)
    return student


def _text_model(model: VisionLanguageModel) -> Any:
    assert isinstance(model, PretrainedVLM)
    return model.model.get_decoder()


def _layers(body: Any) -> tuple[nn.ModuleList, str]:
    found = decoder_layers(body)
    if found is None:
        raise UserError(f"from_teacher: not known where {type(body).__name__} keeps its layers; choose another teacher")
    return found


def count_parameters(model: VisionLanguageModel) -> dict[str, int]:
    """Return the number of parameters of each part; a shared one counts once, where it first appears."""
    seen: set[int] = set()
    counts = {}
    for name, part in model.parts.items():
        new = {id(p): p for p in part.parameters() if id(p) not in seen}
        seen |= set(new)
        counts[name] = sum(map(size_of, new.values()))
    return counts


def size_of(parameter: nn.Parameter) -> int:
    """Return a parameter's size before ZeRO-3 sharded it or bitsandbytes packed two values into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())
