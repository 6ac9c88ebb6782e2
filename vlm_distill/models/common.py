"""Helpers of all models: checked settings, data types, tensors of lists, attention, parameters, checkpointing."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import UserError

if TYPE_CHECKING:
    from transformers import Cache

T = TypeVar("T")


def check_keys(where: str, settings: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ``UserError`` for the first key of ``settings`` that is not ``known``, naming the nearest one."""
    known = list(known)
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            raise UserError(f"{where}: unknown key '{key}'; {hint}")


def read_settings(kind: type[T], where: str, settings: Mapping[str, Any]) -> T:
    """Fill a settings dataclass from a mapping. Raise ``UserError`` for unknown and missing keys."""
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}: expected a mapping of settings, got {settings!r}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    check_keys(where, settings, [f.name for f in fields])
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in settings:
            raise UserError(f"{where}: '{f.name}' is missing")
    return kind(**settings)


def choose(where: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ``UserError`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"{where}: '{value}' is not one of {', '.join(choices)}")


DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a dtype by its name (``bfloat16`` or ``bf16`` …); ``None`` and dtypes pass through."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    choose("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def check_attention(attn_implementation: str | None) -> None:
    """Raise ``UserError`` if FlashAttention is requested but not installed."""
    if attn_implementation and attn_implementation.startswith("flash_attention"):
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise UserError(
                f"attn_implementation: '{attn_implementation}' needs a CUDA device and the flash-attn package; "
                "use 'sdpa' or 'eager', or install flash-attn"
            )


@contextmanager
def built_whole() -> Iterator[None]:
    """Context manager: inside it, Transformers makes whole parameters even while ZeRO-3 loading is on.

    ``HfDeepSpeedConfig`` is alive then. A part that we measure or fill must be whole; the engine shards it afterwards.
    """
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


def with_cache(module: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """Return the arguments by which a Transformers model fills a cache, or does without one."""
    if cache is None:
        return {"use_cache": False}
    return {"use_cache": True, _cache_name(module): cache}


def takes_cache(module: nn.Module) -> bool:
    """Return whether a Transformers model takes a cache at all."""
    return _cache_name(module) in inspect.signature(module.forward).parameters


def _cache_name(module: nn.Module) -> str:
    """Return what a Transformers model calls its cache; models before 5.24 had another name for it."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def checkpoint_layers(model: Any) -> None:
    """Recompute a Transformers model's layers in the backward, if its class supports it."""
    if model.supports_gradient_checkpointing:
        # Transformers renamed the method within version 5; the first argument is the same.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def integers(values: Sequence[int]) -> Tensor:
    """Return an int64 tensor ``[n]`` of a list; for short lists in a quarter of the time of ``torch.tensor``."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def booleans(values: Sequence[bool]) -> Tensor:
    """Return a bool tensor ``[n]`` of a list, like :func:`integers`."""
    return torch.from_numpy(np.array(values, dtype=np.bool_))


def generation_ends(model: Any) -> set[int]:
    """Return the end tokens that the model's generation settings name."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if isinstance(eos, list):
        return set(eos)
    return set() if eos is None else {eos}


def tied_names(module: nn.Module) -> set[str]:
    """Return the names of parameters that also have an earlier name."""
    seen: set[int] = set()
    aliases = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            aliases.add(name)
        seen.add(id(parameter))
    return aliases


def cast_parameters(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast floating-point parameters to ``dtype``.

    Buffers stay (rotary frequencies need float32), and so does batch norm as a whole: torch takes its weights and
    running statistics in one dtype only, and these would stop moving in 16 bits.
    """
    if dtype is None:
        return
    for part in module.modules():
        is_norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
        kept = torch.float32 if is_norm and dtype.itemsize < 4 else dtype
        for parameter in part.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(kept)


def size_of(parameter: nn.Parameter) -> int:
    """Return a parameter's size before ZeRO-3 sharded it or bitsandbytes packed two values into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def count_parameters(parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the number of parameters of each part; a shared one counts once, where it first appears."""
    seen: set[int] = set()
    counts = {}
    for name, part in parts.items():
        new = {id(p): p for p in part.parameters() if id(p) not in seen}
        seen |= set(new)
        counts[name] = sum(map(size_of, new.values()))
    return counts
