"""Read published weights from files, without running code from them, and rename them as timm does."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from data.errors import UserError, first_line

#: Keys under which checkpoints keep the model, averaged weights first.
_WHOLE = ("state_dict_ema", "model_ema", "state_dict", "model", "net")
_DEEPEST = 3
#: Usual names of classification layers.
_HEADS = ("fc", "classifier", "head", "head.fc", "heads.head", "classifier.6", "linear")
#: Safe types beside tensors: NumPy numbers (a best accuracy; NumPy 1 has the function elsewhere), and a training's
#: command line with its paths, as in timm's own checkpoints.
_SCALAR = np.float64(0).__reduce__()[0]
_BESIDE: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")),
    argparse.Namespace,
    PosixPath,
]


@dataclass(frozen=True)
class Weights:
    """Contents of a file of weights.

    Attributes:
        state: tensors under timm's names.
        num_classes: outputs of the classification layer; 0 without one.
        inputs: ``mean`` and ``std`` that these weights need, if their family differs from timm's.
    """

    state: dict[str, Tensor]
    num_classes: int
    inputs: dict[str, Any] = field(default_factory=dict)


def read(path: str | Path) -> Weights:
    """Read weights from a safetensors file, or from a state dict that torch saved, alone or inside a checkpoint.

    Raises:
        UserError: the file is missing, has another format, or has no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights: no file {path}")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_BESIDE):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"weights: {path} is neither a safetensors file nor tensors that torch saved: {first_line(error)}"
        ) from error
    for _ in range(_DEEPEST):
        if isinstance(found, Mapping):
            found = next((found[k] for k in _WHOLE if isinstance(found.get(k), Mapping)), found)
    state = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not state:
        raise UserError(f"weights: {path} holds no state dict (looked for tensors, then {', '.join(_WHOLE)})")
    state = clean_state_dict(state)
    inputs: dict[str, Any] = {}
    for naming in NAMINGS:
        if naming.mark in state:
            inputs = naming.inputs(state)
            state = naming.rename(state)
            break
    heads = [state[f"{h}.weight"] for h in _HEADS if f"{h}.weight" in state]
    return Weights(state, int(heads[0].shape[0]) if heads else 0, inputs)


def _efficientnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename EfficientNet and its Lite variant: modules have underscores, blocks are numbered through."""
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanding = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanding |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    excite = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    # timm numbers blocks within stages; a stage begins where a block changes the width.
    places: dict[str, str] = {}
    stage, place = -1, 0
    for number in range(sum(k.endswith("._project_conv.weight") for k in state)):
        out = state[f"_blocks.{number}._project_conv.weight"].shape[0]
        first = state.get(f"_blocks.{number}._expand_conv.weight", state[f"_blocks.{number}._depthwise_conv.weight"])
        width_in = first.shape[1] if f"_blocks.{number}._expand_conv.weight" in state else first.shape[0]
        stage, place = (stage, place + 1) if number and out == width_in else (stage + 1, 0)
        places[str(number)] = f"blocks.{stage}.{place}"
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            names = expanding if f"_blocks.{parts[1]}._expand_conv.weight" in state else plain
            head, rest = f"{places[parts[1]]}.{(names | excite).get(parts[2], parts[2])}", parts[3:]
        else:
            head, rest = outer.get(parts[0], parts[0]), parts[1:]
        renamed[".".join([head, *rest])] = value
    return renamed


def _efficientnet_inputs(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the input of the Lite variants (no squeeze and excitation): ``(pixel - 127) / 128``."""
    lite = not any("_se_reduce" in k for k in state)
    return {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3} if lite else {}


def _mobilenet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename MobileNet-V1 that is one sequence ``model.0`` … ``model.13`` and ``fc``."""
    stages = (1, 2, 2, 6, 2)
    places = [f"blocks.{s}.{b}" for s, blocks in enumerate(stages) for b in range(blocks)]
    inner = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "fc":
            parts[0] = "classifier"
        elif parts[:2] == ["model", "0"]:
            parts[:3] = ["conv_stem" if parts[2] == "0" else "bn1"]
        elif parts[0] == "model":
            parts[:3] = [places[int(parts[1]) - 1], inner[parts[2]]]
        renamed[".".join(parts)] = value
    return renamed


def _wide_resnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace(".convShortcut.", ".shortcut."): v for k, v in state.items()}


def _cifar_mobilenet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("classifier.0.", "classifier."): v for k, v in state.items()}


def _none(state: dict[str, Tensor]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Naming:
    """A family of published weights: a name that identifies it, and how to rename it."""

    mark: str
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    inputs: Callable[[dict[str, Tensor]], dict[str, Any]] = _none


#: Other families need no entry: CIFAR ResNets, VGGs and ShuffleNets have our names, and torchvision's ResNets timm's.
NAMINGS = (
    Naming("_conv_stem.weight", _efficientnet, _efficientnet_inputs),
    Naming("model.0.0.weight", _mobilenet),
    Naming("block1.layer.0.convShortcut.weight", _wide_resnet),
    Naming("block2.layer.0.convShortcut.weight", _wide_resnet),
    Naming("blocks.0.0.conv.0.weight", _cifar_mobilenet),
)
