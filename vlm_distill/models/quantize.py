"""Load linear layers in fewer bits through Transformers: int8 and NF4 by bitsandbytes, float8 by torchao."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data.errors import UserError

from .composed import ComposedVLM
from .interface import VisionLanguageModel
from .weightless import weightless

Kind = Literal["int8", "nf4", "fp8"]
#: Bits of a quantised weight with its scales. NF4 has an 8-bit scale for 64 weights, and a scale for 256 of these.
BITS = {"nf4": 4.127, "int8": 8.0, "fp8": 8.0}
_PACKAGES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp8": "torchao"}


def quantization(kind: Kind, dtype: torch.dtype, role: str) -> Any:
    """Return Transformers' settings for loading a model in fewer bits. Embeddings, norms and lm head are unchanged.

    - ``int8``: LLM.int8() (Dettmers et al. 2022): products in 8 bits, those of outlier features in 16.
    - ``nf4``: 4 bits with quantised scales (Dettmers et al. 2023, QLoRA).
    - ``fp8``: weights in float8 e4m3 with one scale a row; products in ``dtype``.

    Args:
        kind: how weights are stored.
        dtype: precision of computation (``int8`` always computes in 16 bits).
        role: ``student`` or ``teacher``, for the message.

    Returns:
        The ``quantization_config`` of ``from_pretrained``; if models have no weights, only the kind.

    Raises:
        UserError: the package for it is not installed.
    """
    if weightless():
        return kind
    package = _PACKAGES[kind]
    if find_spec(package) is None:
        raise UserError(
            f"{role}.quantize: {kind} needs the package {package}; install vlm-distill[quantize], or leave quantize out"
        )
    if kind == "fp8":
        from torchao.quantization import Float8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Float8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def quantised_weights(model: VisionLanguageModel) -> list[Tensor]:
    """Return the weights that are loaded in fewer bits: linear layers' except the lm head; assembled: the decoder's."""
    root = model.parts["decoder"] if isinstance(model, ComposedVLM) else model
    head = {id(p) for p in model.head.parameters}
    linear = {id(m.weight): m.weight for m in root.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
    return [weight for i, weight in linear.items() if i not in head]


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for a CPU at the first evaluation: gradients cannot pass repacked ones.

    A student is trained further after it has answered.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
