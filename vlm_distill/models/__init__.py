"""Teachers and students, assembled from parts or pretrained, behind one interface."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_distill.neighbours import check_neighbours

check_neighbours()  # before anything of `data` is imported

from data.errors import UserError, first_line

from . import internvl_chat
from .answers import Answer
from .assembly import build, load_decoder
from .common import as_dtype, cast_parameters, check_attention
from .composed import CONFIG_NAME, ComposedVLM
from .composed_folder import load_composed
from .composed_processor import ComposedProcessor
from .families import family
from .family_classes import adapted, adapted_processor
from .folder import ADAPTER_CONFIG, adapter_base, check_folder
from .in_memory import held_model
from .interface import Outputs, VisionLanguageModel
from .lm_head import LMHead
from .loading import from_pretrained, read_config
from .lora import merge_adapter
from .pretrained import PretrainedVLM
from .processor import Processor
from .templates import limit_templates
from .tokenizer import load_tokenizer, read_template

__all__ = [
    "Answer",
    "ComposedVLM",
    "LMHead",
    "Outputs",
    "PretrainedVLM",
    "Processor",
    "VisionLanguageModel",
    "build_vlm",
    "load_processor",
    "load_vlm",
    "wrap_model",
]

# Templates come with a model's files: everything that renders one in this process does so under limits.
limit_templates()


def build_vlm(settings: Mapping[str, Any], tokenizer: Any = None) -> VisionLanguageModel:
    """Build a model from parts (see :class:`~vlm_distill.models.assembly.ComposedSettings`).

    Raises:
        UserError: a wrong setting, or a part that cannot be found or built.
    """
    return build(settings, tokenizer)


def load_vlm(
    name_or_folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    chat_template: str | None = None,
    quantize: Any = None,
) -> VisionLanguageModel:
    """Load a whole model: one this suite saved, a vision-language model or causal LM of Transformers, or an adapter.

    An adapter of peft is merged into the base that its folder names. InternVL2's own checkpoints become Transformers'
    InternVL; none of their code is run.

    Args:
        name_or_folder: a folder, a name that Transformers finds, or that of a model in memory (:mod:`.in_memory`).
        dtype: of the parameters; ``None``: as saved.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2`` …
        trust_remote_code: run code that comes with the model.
        tokenizer: used instead of the model's own.
        chat_template: text or file, used instead of the model's own.
        quantize: a ``quantization_config`` of Transformers, for one of its models.

    Raises:
        UserError: no such model, a model of another kind, one larger than this machine, or weights that are missing,
            left over, of other shapes, NaN or infinite.
    """
    name = str(name_or_folder)
    held = held_model(name)
    if held is not None:
        settings = {"tokenizer": tokenizer, "chat_template": chat_template, "attn_implementation": attn_implementation}
        given = [key for key, value in (settings | {"quantize": quantize}).items() if value is not None]
        if given:
            raise UserError(f"{given[0]}: {name} is loaded already; set it there, and leave {given[0]} out")
        return held.take(as_dtype(dtype) or held.model.dtype)
    template = None if chat_template is None else read_template(chat_template)
    check_attention(attn_implementation)
    check_folder(name)
    if (Path(name) / ADAPTER_CONFIG).is_file():
        return _load_adapted(Path(name), dtype, tokenizer, template, attn_implementation, trust_remote_code)
    if (Path(name) / CONFIG_NAME).is_file():
        if quantize is not None:
            raise UserError(f"quantize: '{name}' is assembled; only models of Transformers load in fewer bits")
        tokenizer = tokenizer or load_tokenizer(name)
        tokenizer.chat_template = template or tokenizer.chat_template
        if tokenizer.chat_template is None:
            raise UserError(
                f"model: '{name}' was saved with a chat template, and chat_template.jinja is missing; put it back, or "
                "give one as 'chat_template'"
            )
        return load_composed(name, dtype=dtype, attn_implementation=attn_implementation, tokenizer=tokenizer)
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    options |= {"quantization_config": quantize} if quantize is not None else {}
    model = _load_transformers(name, as_dtype(dtype) or "auto", options, trust_remote_code, tokenizer, template)
    cast_parameters(model, as_dtype(dtype))
    return model


def _load_transformers(
    name: str, dtype: Any, options: Mapping[str, Any], trust_remote_code: bool, tokenizer: Any, template: str | None
) -> VisionLanguageModel:
    """Load a Transformers model, whichever kind its configuration says it is."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig

    try:
        plain, _ = PreTrainedConfig.get_config_dict(name)
        foreign = plain.get("model_type") == internvl_chat.MODEL_TYPE
        config = None if foreign else read_config(name, trust_remote_code)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: no model at '{name}': {first_line(error)}; check the name, or download it") from error
    if config is None:
        if "quantization_config" in options:
            raise UserError(f"quantize: '{name}' is converted as it loads; save the loaded model, and name its folder")
        own, processor = internvl_chat.load_internvl_chat(name, plain, dtype, options)
        return _with_processor(name, own, processor, tokenizer, template)
    remote = getattr(config, "auto_map", {}) if trust_remote_code else {}
    if (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        or family(config.model_type).causal
        or "AutoModelForImageTextToText" in remote
    ):
        return _load_image_text(name, config, dtype, options, trust_remote_code, tokenizer, template)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote:
        tokenizer = tokenizer or load_tokenizer(name, trust_remote_code)
        tokenizer.chat_template = template or tokenizer.chat_template
        decoder = load_decoder(name, dtype, trust_remote_code, options)
        return ComposedVLM(decoder, ComposedProcessor(tokenizer))
    raise UserError(
        f"model: '{name}' is a {config.model_type} model, neither a vision-language model nor a causal LM that "
        "Transformers knows; choose another or set trust_remote_code"
    )


def wrap_model(model: Any, processor: Any) -> VisionLanguageModel:
    """Put a loaded model of Transformers behind the suite's interface.

    Args:
        model: a vision-language model or causal LM; its weights are shared, and parts that see no images, such as audio
            towers, are frozen.
        processor: the model's processor, or a language model's tokenizer; a copy is kept.

    Raises:
        UserError: the model is of another kind, is spread over several devices, has adapters of peft, or does not
            belong to this kind of processor.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if hasattr(model, "peft_config"):
        raise UserError(f"{name}: has adapters of peft; merge them first (merge_and_unload)")
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UserError(f"{name}: is not a language model of Transformers with an lm head; load one with AutoModelFor…")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UserError(f"{name}: is spread over several devices (device_map); load it on one, or give its name")
    processor = copy.deepcopy(processor)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or family(config.model_type).causal:
        return _with_processor(name, model, processor, None, None)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name}: is neither a vision-language model nor a causal LM that Transformers knows")
    return ComposedVLM(model, ComposedProcessor(getattr(processor, "tokenizer", processor)))


def load_processor(
    name: str, *, trust_remote_code: bool = False, tokenizer: Any = None, chat_template: str | None = None
) -> Processor:
    """Load the processor of a Transformers model without its weights; arguments as in :func:`load_vlm`."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoProcessor

    template = None if chat_template is None else read_template(chat_template)
    try:
        config = read_config(name, trust_remote_code)
        sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or family(config.model_type).causal
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code) if sees else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: no processor at '{name}': {first_line(error)}; check the name or folder") from error
    if processor is not None:
        return adapted_processor(config, _prepared(name, config, processor, tokenizer, template))
    tokenizer = tokenizer or load_tokenizer(name, trust_remote_code)
    tokenizer.chat_template = template or tokenizer.chat_template
    return ComposedProcessor(tokenizer)


def _load_adapted(
    folder: Path, dtype: Any, tokenizer: Any, template: str | None, attention: str | None, trust_remote_code: bool
) -> VisionLanguageModel:
    """Load an adapter's base and merge the adapter; tokenizer and template come from the adapter's folder, if there."""
    base = adapter_base(folder)
    if tokenizer is None and (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(str(folder), trust_remote_code)
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    model = load_vlm(
        base,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        tokenizer=tokenizer,
        chat_template=template,
    )
    merge_adapter(model, folder)
    return model


def _load_image_text(
    name: str,
    config: Any,
    dtype: Any,
    options: Mapping[str, Any],
    trust_remote_code: bool,
    tokenizer: Any,
    template: str | None,
) -> PretrainedVLM:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    kind = AutoModelForCausalLM if family(config.model_type).causal else AutoModelForImageTextToText
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = from_pretrained(kind, name, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: '{name}' cannot be loaded: {first_line(error)}; check the name or folder") from error
    return _with_processor(name, model, processor, tokenizer, template)


def _with_processor(name: str, model: Any, processor: Any, tokenizer: Any, template: str | None) -> PretrainedVLM:
    """Put a Transformers model and processor behind the suite's interface, with the given tokenizer and template."""
    return adapted(model, _prepared(name, model.config, processor, tokenizer, template))


def _prepared(name: str, config: Any, processor: Any, tokenizer: Any, template: str | None) -> Any:
    if not hasattr(processor, "tokenizer"):
        # Transformers falls back on a part if it does not know the whole processor.
        raise UserError(
            f"model: '{name}' has no processor of images and text, only a {type(processor).__name__}; "
            "is processor_config.json there, and its processor_class right?"
        )
    if tokenizer is not None:
        processor.tokenizer = tokenizer
    if not processor.tokenizer.is_fast:
        raise UserError(f"tokenizer: '{name}' has no fast tokenizer; character offsets need one")
    if template is not None and not family(config.model_type).chat:
        raise UserError(f"chat_template: '{name}' is a {config.model_type}, which has no chat; leave it out")
    # Some processors (Phi-4-multimodal) leave their template to the tokenizer.
    processor.chat_template = template or processor.chat_template or processor.tokenizer.chat_template
    if processor.chat_template is None and family(config.model_type).chat:
        raise UserError(f"model: '{name}' has no chat template; give one as 'chat_template'")
    return processor
