"""The learning rate over a run, and parameter groups with and without weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from data.errors import UserError


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: float, min_ratio: float) -> float:
    """Return the factor on the peak learning rate in an optimizer step.

    Args:
        step: counted from 0.
        steps: of the run.
        schedule: ``cosine``, ``linear`` or ``constant``; the first two fall to ``min_ratio`` at the last step.
        warmup: steps of linear warm-up; below 1, a share of ``steps``.
        min_ratio: factor at the end.
    """
    rise = round(warmup * steps) if warmup < 1 else round(warmup)
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - rise) / max(1, steps - 1 - rise))
    fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return min_ratio + (1 - min_ratio) * fall


def lr_scales(parts: Mapping[str, nn.Module], part_lr: Mapping[Any, float], lr: float) -> dict[nn.Parameter, float]:
    """Return factors on the learning rate ``lr`` for the parameters of parts with their own learning rate.

    Raises:
        UserError: a part does not exist, or is not trained.
    """
    scales: dict[nn.Parameter, float] = {}
    for name, own in part_lr.items():
        if name not in parts:
            raise UserError(f"optimizer.part_lr: this student has no {name}; it has {', '.join(parts)}")
        trained = [parameter for parameter in parts[name].parameters() if parameter.requires_grad]
        if not trained:
            raise UserError(f"optimizer.part_lr: the {name} does not train; leave it out, or name it in student.train")
        scales |= dict.fromkeys(trained, own / lr)
    return scales


def parameter_groups(
    model: nn.Module, weight_decay: float, scales: Mapping[nn.Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """Group trained parameters: matrices decay; biases, norms, embeddings and learned tokens do not.

    Frozen parameters are in no group, so they take no optimizer state. A tied matrix counts as an embedding.
    With ``scales`` there are two groups for each factor on the learning rate, stored as the group's ``lr_scale``.
    """
    no_decay: dict[int, nn.Parameter] = {}
    decay: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            matrix = name.endswith(("weight", "proj")) and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)
            (decay if matrix else no_decay)[id(parameter)] = parameter
    scales = scales or {}
    groups: list[dict[str, Any]] = []
    for factor in sorted({1.0, *scales.values()}):
        matrices = [p for i, p in decay.items() if i not in no_decay and scales.get(p, 1.0) == factor]
        others = [p for p in no_decay.values() if scales.get(p, 1.0) == factor]
        for params, decays in ((matrices, weight_decay), (others, 0.0)):
            if params:
                groups.append({"params": params, "weight_decay": decays} | ({"lr_scale": factor} if scales else {}))
    return groups
