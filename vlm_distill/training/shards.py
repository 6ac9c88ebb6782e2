"""Read whole weights and optimizer states from a checkpoint of any ZeRO stage and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_OPTIMIZER = "*_optim_states.pt"
_MODEL = "*_model_states.pt"


@dataclass
class Whole:
    """The content of a checkpoint, every tensor whole and on the CPU.

    Attributes:
        client: the run's own entries.
        weights: trained parameters by name, float32 where ZeRO kept float32 masters.
        states: the optimizer's tensors by parameter and kind, such as ``exp_avg``; empty before the first step.
        scalars: the optimizer's other values by parameter, such as ``step``.
        groups: the optimizer's groups without their parameters.
        rest: the module's other entries: frozen parameters, buffers, the losses' own state.
    """

    client: dict[str, Any]
    weights: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]
    scalars: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    rest: dict[str, Any]


def written_by(folder: Path) -> tuple[bool, int | None]:
    """Return whether ZeRO-3 wrote a checkpoint, and on how many ranks; ``None`` without ZeRO, for any number."""
    return len(list(folder.glob(_MODEL))) != 1 or any(folder.glob("zero_pp_rank_*_model_states.pt")), (
        len(list(folder.glob(_OPTIMIZER))) or None
    )


def read_whole(folder: Path, names: Sequence[Sequence[str]]) -> Whole:
    """Read all ranks' files.

    Args:
        folder: where DeepSpeed wrote them. They are pickles, and trusted like code.
        names: names of the trained parameters, by the optimizer's groups; needed for checkpoints without ZeRO.
    """
    models = [_load(path) for path in _ranked(folder, _MODEL)]
    shards = [_load(path)["optimizer_state_dict"] for path in _ranked(folder, _OPTIMIZER)]
    saved = models[0]
    if not shards:
        return _without_zero(saved, names)
    third = "fp32_flat_groups" in shards[0]
    shapes: list[Mapping[str, Any]] = saved["param_shapes"]
    masters = [shard["fp32_flat_groups" if third else "single_partition_of_fp32_groups"] for shard in shards]
    inner = [shard["optimizer_state_dict" if third else "base_optimizer_state"] for shard in shards]
    paddings = shards[0].get("param_alignment_paddings")

    def split(parts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return parameters from each rank's flat tensors: one per group, or per sub-group in ZeRO-3."""
        return _of_parameters(parts, shapes) if third else _of_groups(parts, shapes, paddings)

    kinds = [kind for kind, value in inner[0]["state"].get(0, {}).items() if isinstance(value, Tensor) and value.ndim]
    states: dict[str, dict[str, Tensor]] = {name: {} for name in chain.from_iterable(shapes)}
    for kind in kinds:
        for name, tensor in split([_flat_states(rank, kind) for rank in inner]).items():
            states[name][kind] = tensor
    # All parameters are updated together, so one step count holds for all.
    scalars = {k: v for k, v in inner[0]["state"].get(0, {}).items() if k not in kinds}
    weights = split(masters)
    rest = {name: value for name, value in saved["module"].items() if name not in weights}
    frozen = saved.get("frozen_param_shapes") or {}
    for name, shape in frozen.items():
        pieces = [model["frozen_param_fragments"][name].flatten() for model in (models if third else models[:1])]
        rest[name] = torch.cat(pieces)[: math.prod(shape)].view(shape)
    groups = [_plain(group) for group in inner[0]["param_groups"]]
    return Whole(saved["run"], weights, states, dict.fromkeys(states, scalars), groups, rest)


def _flat_states(optimizer: Mapping[str, Any], kind: str) -> list[Tensor]:
    """Return one kind of a rank's flat states, in the order of groups."""
    return [state[kind] for _, state in sorted(optimizer["state"].items())]


def _without_zero(saved: Mapping[str, Any], names: Sequence[Sequence[str]]) -> Whole:
    """Read a checkpoint of stage 0, which has whole tensors."""
    flat, optimizer = list(chain.from_iterable(names)), saved["optimizer"]
    numbers = chain.from_iterable(group["params"] for group in optimizer["param_groups"])
    states, scalars = {}, {}
    for name, number in zip(flat, numbers, strict=True):
        state = optimizer["state"].get(number, {})
        states[name] = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim}
        scalars[name] = {k: v for k, v in state.items() if k not in states[name]}
    module = saved["module"]
    weights = {name: module[name] for name in flat}
    rest = {name: value for name, value in module.items() if name not in weights}
    return Whole(saved["run"], weights, states, scalars, [_plain(g) for g in optimizer["param_groups"]], rest)


def _of_groups(
    parts: Sequence[Sequence[Tensor]], shapes: Sequence[Mapping[str, Any]], paddings: Sequence[Sequence[int]] | None
) -> dict[str, Tensor]:
    """Return the parameters of ZeRO 1 and 2: each group is one flat tensor, cut anywhere."""
    found = {}
    for number, group in enumerate(shapes):
        flat, start = torch.cat([rank[number] for rank in parts]), 0
        for place, (name, shape) in enumerate(group.items()):
            found[name] = flat[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape) + (paddings[number][place] if paddings else 0)
    return found


def _of_parameters(parts: Sequence[Sequence[Tensor]], shapes: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the parameters of ZeRO 3: each one is cut into equal shares, padded on the last rank."""
    flat = [_joined(rank) for rank in parts]
    start, found = 0, {}
    for name, shape in chain.from_iterable(group.items() for group in shapes):
        share = math.ceil(math.prod(shape) / len(flat))
        pieces = [rank[start : start + share] for rank in flat]
        found[name] = torch.cat(pieces)[: math.prod(shape)].view(shape)
        start += share
    return found


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _ranked(folder: Path, pattern: str) -> list[Path]:
    def rank(path: Path) -> int:
        _, _, after = path.name.partition("pp_rank_")
        return int(after.split("_")[0]) if after else 0

    return sorted(folder.glob(pattern), key=rank)


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
