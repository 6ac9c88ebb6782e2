"""Linear layers' weights in fewer bits, as Transformers loads them: int8 and NF4 by bitsandbytes, float8 by torchao."""

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
#: Bits of a quantised weight with its scales: of NF4 one of 8 bits for 64 weights, and its own scale for 256 of these.
BITS = {"nf4": 4.127, "int8": 8.0, "fp8": 8.0}
_PACKAGES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp8": "torchao"}


def quantization(kind: Kind, dtype: torch.dtype, role: str) -> Any:
    """The settings with which Transformers loads a model in fewer bits. Embeddings, norms and lm head stay as they are.

    - ``int8``: LLM.int8() (Dettmers et al. 2022): products in 8 bits, those of outlying features in 16.
    - ``nf4``: 4 bits with scales that are quantised as well (Dettmers et al. 2023, QLoRA).
    - ``fp8``: weights in float8 e4m3 with a scale a row; products are in ``dtype``.

    Args:
        kind: how weights are stored.
        dtype: in which is computed (of ``int8``: 16 bits, in any case).
        role: ``student`` or ``teacher``, for the message.

    Returns:
        What ``from_pretrained`` takes; without weights, of which there are none to quantise, the kind alone.

    Raises:
        UserError: the package that does it is missing.
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
    """Weights that are loaded in fewer bits: linear layers' but the output layer's; of an assembled model's decoder."""
    root = model.parts["decoder"] if isinstance(model, ComposedVLM) else model
    head = {id(p) for p in model.head.parameters}
    linear = {id(m.weight): m.weight for m in root.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
    return [weight for i, weight in linear.items() if i not in head]


def keep_gradients(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking weights for a CPU when they are first read in evaluation: no gradient goes
    through those, and a student learns after it has answered.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
