"""Load an assembled model from its folder, checking its settings before anything is built."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from data.errors import UserError, first_line

from .assembly import assemble, new_decoder
from .common import (
    as_dtype,
    cast_parameters,
    check_attention,
    check_keys,
    tied_names,
)
from .composed import CONFIG_NAME, FORMAT, WEIGHTS_NAME, ComposedVLM
from .folder import (
    check_open_clip_config,
    check_settings,
    check_stored_precision,
    check_timm_options,
    is_place,
    read_object,
)
from .loading import Report, check_finite, check_report, check_shapes
from .tokenizer import load_tokenizer
from .vision_towers import VisionEncoderSettings
from .weightless import needs_weights


def load_composed(
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    tokenizer: Any = None,
) -> ComposedVLM:
    """Load a model that :meth:`ComposedVLM.save_pretrained` wrote with its vision encoder.

    Args:
        folder: contains ``vlm_distill.json``.
        dtype: ``None``: as saved.
        attn_implementation: as in :class:`~.assembly.ComposedSettings`.
        tokenizer: used instead of the saved one.

    Raises:
        UserError: another format, settings that would fetch or open other files, or weights of another model.
    """
    folder = Path(folder)
    check_attention(attn_implementation)
    config = _read_composed(folder / CONFIG_NAME)
    tokenizer = load_tokenizer(str(folder)) if tokenizer is None else tokenizer
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    decoder = new_decoder(config["decoder"], tokenizer, attention)
    decoder.generation_config.eos_token_id = config["end_tokens"]
    model = assemble(decoder, tokenizer, config["vision_encoder"], config["projector"], attn_implementation)
    cast_parameters(model, as_dtype(config["dtype"]))
    _fill(model, folder)
    cast_parameters(model, as_dtype(dtype))
    return model


#: The keys of ``vlm_distill.json`` and the types of their values.
_KEYS: dict[str, type] = {
    "format": int,
    "dtype": str,
    "vision_encoder": dict,
    "projector": dict,
    "decoder": dict,
    "end_tokens": list,
}


def _read_composed(path: Path) -> dict[str, Any]:
    """Return a saved model's settings, after checking that none names a place outside its folder.

    Raises:
        UserError: another format, an unknown key, a value of another type, or weights from elsewhere.
    """
    config = read_object(path)
    if config.get("format") != FORMAT:
        raise UserError(f"model: {path} has format {config.get('format')}, this version reads {FORMAT}; upgrade")
    check_keys(f"model: {path}", config, _KEYS)
    for key, kind in _KEYS.items():
        if not isinstance(config.get(key), kind):
            raise UserError(f"model: {path}: {key} is missing or not a {kind.__name__}; is the copy complete?")
    if not all(isinstance(token, int) for token in config["end_tokens"]):
        raise UserError(f"model: {path}: end_tokens must be token ids")
    where = f"model: {path}: vision_encoder"
    check_keys(where, config["vision_encoder"], [field.name for field in fields(VisionEncoderSettings)])
    encoder = config["vision_encoder"] = config["vision_encoder"] | {"pretrained": False}
    source, own = encoder.get("source"), encoder.get("config")
    if source == "timm":
        if not isinstance(encoder.get("name"), str) or is_place(encoder["name"]):
            raise UserError(f"{where}.name is {encoder.get('name')!r}; it must be an architecture of timm")
        check_timm_options(own or {}, f"{where}.config")
    elif source == "open_clip":
        check_open_clip_config(own, f"{where}.config")
    elif not isinstance(own, dict):
        raise UserError(f"{where}.config is missing or not an object; is the copy complete?")
    else:
        check_settings(own, f"{where}.config")
    check_settings(config["decoder"], f"model: {path}: decoder")
    if not isinstance(config["decoder"].get("model_type"), str):
        raise UserError(f"model: {path}: decoder.model_type is missing or not a string; is the copy complete?")
    return config


@needs_weights
def _fill(model: ComposedVLM, folder: Path) -> None:
    """Put the saved weights into the model, all of them and no others."""
    name = str(folder)
    try:
        weights = load_file(folder / WEIGHTS_NAME)
    except Exception as error:
        raise UserError(f"model: '{name}' cannot be read: {first_line(error)}; is the copy complete?") from error
    check_stored_precision(folder)
    wanted = model.state_dict()
    mismatched = tuple(
        (key, tuple(weights[key].shape), tuple(wanted[key].shape))
        for key in sorted(weights.keys() & wanted.keys())
        if weights[key].shape != wanted[key].shape
    )
    missing = frozenset(wanted.keys() - weights.keys() - tied_names(model))
    report = Report(missing, frozenset(weights.keys() - wanted.keys()), mismatched)
    check_report(name, report)
    check_shapes(name, report)
    model.load_state_dict(weights, strict=False)
    check_finite(name, model)
