"""What a forward multiplies, part by part, as PyTorch counts it."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.batch import ModelInputs
from vlm_distill.models.interface import VisionLanguageModel


def multiplied(model: VisionLanguageModel, inputs: ModelInputs) -> dict[str, int]:
    """Operations of a forward by the model's parts, but for the output layer and for fused attention.

    PyTorch's counter does not know ``scaled_dot_product_attention`` on a CPU, and products of experts nowhere.
    """
    experts = {torch.ops.aten._grouped_mm: lambda rows, experts, *_, **__: 2 * rows[0] * rows[1] * experts[-1]}
    with FlopCounterMode(display=False, custom_mapping=experts) as counter, torch.no_grad():
        model(inputs, torch.arange(0))
    counts = counter.get_flop_counts()
    names = {id(module): f"{type(model).__name__}.{name}" for name, module in model.named_modules()}

    def of(module: nn.Module) -> int:
        # Views of several modules, and lists whose members are called one by one, are not called themselves.
        name = names.get(id(module))
        return sum(counts[name].values()) if name in counts else sum(map(of, module.children()))

    found = {name: of(part) for name, part in model.parts.items()}
    assert sum(found.values()) == counter.get_total_flops()
    return found
