"""Published weights in files: read without running code from them, and named as timm names them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from data.errors import UserError
from vlm_distill.models.common import first_line

#: Where checkpoints keep the model among other things, averaged weights first.
_WHOLE = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
#: Classification layers, by the usual names.
_HEADS = ("fc", "classifier", "head", "head.fc", "heads.head", "classifier.6", "linear")


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        state: tensors under timm's names.
        num_classes: outputs of the classification layer; 0 without one.
        inputs: ``mean`` and ``std`` that these weights want, where their family differs from timm's.
    """

    state: dict[str, Tensor]
    num_classes: int
    inputs: dict[str, Any] = field(default_factory=dict)


def read(path: str | Path) -> Weights:
    """Weights from a safetensors file or a state dict that torch saved, possibly with other things around it.

    Raises:
        UserError: no such file, not one of these, or none with tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: no file {path}")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"weights: {path} is neither a safetensors file nor tensors that torch saved: {first_line(error)}"
        ) from error
    while isinstance(found, Mapping) and not any(isinstance(v, Tensor) for v in found.values()):
        inner = next((found[k] for k in _WHOLE if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    state = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not state:
        raise UserError(f"weights: {path} holds no state dict (looked for tensors, then {', '.join(_WHOLE)})")
    state = clean_state_dict(state)
    heads = [state[f"{h}.weight"] for h in _HEADS if f"{h}.weight" in state]
    return Weights(state, int(heads[0].shape[0]) if heads else 0)
