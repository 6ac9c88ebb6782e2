"""Find and read layers with peft's LoRA without importing peft: weights in a model and in a state dict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

#: peft's name for an adapter that was given none.
ADAPTER = "default"


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers with LoRA by path."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def with_adapters(layer: Any) -> Tensor:
    """Return a linear layer's weight plus what peft's LoRA adds to it, differentiable in both."""
    weight = layer.weight
    if not hasattr(layer, "get_delta_weight") or layer.disable_adapters or layer.merged:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            drops = layer.training and isinstance(layer.lora_dropout[adapter], nn.Dropout)
            if drops or layer.use_dora.get(adapter):
                raise ValueError(
                    "LoRA on the output layer works without dropout and without DoRA; leave them out there"
                )
            weight = weight + layer.get_delta_weight(adapter)
    return weight


def plain_state(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict that a model would have with its adapters merged.

    Args:
        model: with adapters or without; unchanged.
        state: its weights, if its own are sharded over ranks.
    """
    state = model.state_dict() if state is None else state
    layers = adapted_layers(model)
    if not layers:
        return state
    plain = {}
    for key, tensor in state.items():
        owner = next((path for path in _owners(key) if path in layers), None)
        if owner is None:
            plain[key] = tensor
        elif key.startswith(f"{owner}.base_layer."):
            leaf = key.removeprefix(f"{owner}.base_layer.")
            plain[f"{owner}.{leaf}"] = _merged(tensor, layers[owner], state, owner) if leaf == "weight" else tensor
    return plain


def _owners(key: str) -> Iterator[str]:
    """Yield the paths of the modules around a parameter, innermost first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _merged(weight: Tensor, layer: Any, state: dict[str, Tensor], owner: str) -> Tensor:
    """Compute W + s·B·A from a state dict in float32; return it in W's dtype."""
    low, high = (state[f"{owner}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
    delta = layer.scaling[ADAPTER] * (high @ low)
    return (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
