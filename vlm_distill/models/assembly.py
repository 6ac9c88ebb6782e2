"""Build a model from its settings: vision encoder, projector, decoder, tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.errors import UserError, first_line

from .common import (
    as_dtype,
    built_whole,
    cast_parameters,
    check_attention,
    read_settings,
)
from .composed import ComposedVLM
from .composed_processor import ComposedProcessor
from .folder import check_settings
from .loading import check_new_size, from_pretrained
from .projectors import build_projector
from .tokenizer import load_tokenizer, read_template
from .vision_encoders import build_vision_encoder


@dataclass(frozen=True)
class DecoderSettings:
    """A causal LM of Transformers: the ``name`` of a pretrained one, or a ``config`` with its ``model_type``."""

    name: str | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ComposedSettings:
    """Settings of an assembled model.

    Attributes:
        decoder: a name or folder, or the keys of :class:`DecoderSettings`.
        vision_encoder: keys of ``VisionEncoderSettings``; ``None`` makes a language model.
        projector: ``type`` and that type's keys.
        tokenizer: a name or folder; ``None``: the pretrained decoder's.
        chat_template: a Jinja template or the file with it; ``None``: the tokenizer's own.
        dtype: of all parameters; ``None``: float32.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2`` …; ``None``: the best available.
        trust_remote_code: run code that comes with a pretrained decoder.
        quantize: a ``quantization_config`` of Transformers for a pretrained decoder.
    """

    decoder: str | Mapping[str, Any]
    vision_encoder: Mapping[str, Any] | None = None
    projector: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str | torch.dtype | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantize: Any = None


def build(settings: Mapping[str, Any], tokenizer: Any = None) -> ComposedVLM:
    """Build the model described by ``settings`` (see :class:`ComposedSettings`).

    New weights come from torch's global random generator; seed it before.

    Args:
        settings: a mapping with the keys of :class:`ComposedSettings`.
        tokenizer: used instead of the one named in ``settings``.

    Raises:
        UserError: a wrong setting, or a part that cannot be found or built.
    """
    s = read_settings(ComposedSettings, "model", settings)
    check_attention(s.attn_implementation)
    dtype = as_dtype(s.dtype) or torch.float32
    spec = {"name": s.decoder} if isinstance(s.decoder, str) else s.decoder
    decoder_settings = read_settings(DecoderSettings, "decoder", spec)
    if (decoder_settings.name is None) == (decoder_settings.config is None):
        raise UserError("decoder: give either 'name' (pretrained) or 'config' (new weights)")
    if tokenizer is None:
        name = s.tokenizer or decoder_settings.name
        if name is None:
            raise UserError("model.tokenizer: missing; a decoder built from a configuration needs a tokenizer")
        tokenizer = load_tokenizer(name, trust_remote_code=s.trust_remote_code)
    if s.chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)  # it may be the teacher's, which keeps its own template
        tokenizer.chat_template = read_template(s.chat_template)
    attention = {"attn_implementation": s.attn_implementation} if s.attn_implementation else {}
    if decoder_settings.name is not None:
        options = attention | ({"quantization_config": s.quantize} if s.quantize is not None else {})
        decoder = load_decoder(decoder_settings.name, dtype, s.trust_remote_code, options)
    else:
        assert decoder_settings.config is not None
        decoder = new_decoder(decoder_settings.config, tokenizer, attention)
    rows = decoder.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):
        raise UserError(f"decoder: {rows} embeddings are too few for the tokenizer's {len(tokenizer)} tokens")
    model = assemble(decoder, tokenizer, s.vision_encoder, s.projector, s.attn_implementation)
    cast_parameters(model, dtype)
    return model


def assemble(
    decoder: Any,
    tokenizer: Any,
    vision_encoder: Mapping[str, Any] | None,
    projector: Mapping[str, Any] | None,
    attn_implementation: str | None,
) -> ComposedVLM:
    """Put a decoder, a tokenizer and a new vision encoder and projector together."""
    if vision_encoder is None:
        if projector is not None:
            raise UserError("projector: there is no vision_encoder to project; name one or leave the projector out")
        return ComposedVLM(decoder, ComposedProcessor(tokenizer))
    encoder = build_vision_encoder(vision_encoder, attn_implementation)
    projector = {"type": "mlp"} if projector is None else projector
    width = decoder.get_input_embeddings().embedding_dim
    module = build_projector(projector, encoder.width, width, encoder.tokens, encoder.grid)
    processor = ComposedProcessor(tokenizer, encoder.transform, module.tokens(encoder.tokens))
    return ComposedVLM(decoder, processor, encoder, module, projector)


@built_whole()
def new_decoder(settings: Mapping[str, Any], tokenizer: Any, attention: Mapping[str, Any]) -> Any:
    """Build a causal LM with new weights from a configuration with its ``model_type``."""
    options = dict(settings)
    if "model_type" not in options:
        raise UserError("decoder.config: 'model_type' is missing (llama, qwen2, gemma2 …)")
    model_type = options.pop("model_type")
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        check_settings(options, "decoder.config")
        config = AutoConfig.for_model(model_type, **(defaults | options))
        create = partial(AutoModelForCausalLM.from_config, config, trust_remote_code=False, **attention)
        check_new_size("decoder.config", create)
        return create()
    except UserError:
        raise
    except Exception as error:  # the configuration classes' own checks, of many kinds
        raise UserError(f"decoder.config: {model_type} cannot be built: {first_line(error)}") from error


def load_decoder(name: str, dtype: torch.dtype | str, trust_remote_code: bool, options: Mapping[str, Any]) -> Any:
    """Load a pretrained causal LM; ``options`` go to ``from_pretrained``. Raise ``UserError`` if there is none."""
    try:
        return from_pretrained(AutoModelForCausalLM, name, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"decoder: '{name}' cannot be loaded: {first_line(error)}; check the name or folder") from error
