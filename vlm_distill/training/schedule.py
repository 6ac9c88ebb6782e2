"""Learning rates over a run, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: float, min_ratio: float) -> float:
    """The factor on the peak learning rate during optimizer step ``step`` (counted from 0) of ``steps``.

    Args:
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay; biases, norms, embeddings and learned tokens do not.

    Frozen parameters are in neither, so they take no optimizer state. A tied matrix counts as the embedding it is.
    """
    no_decay: dict[int, nn.Parameter] = {}
    decay: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            matrix = name.endswith(("weight", "proj")) and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)
            (decay if matrix else no_decay)[id(parameter)] = parameter
    groups = [
        {"params": [p for i, p in decay.items() if i not in no_decay], "weight_decay": weight_decay},
        {"params": list(no_decay.values()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
