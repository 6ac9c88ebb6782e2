"""Means and confidence intervals over runs that differ only by their seed.

Such runs are in folders ``<name>/seed<k>``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_distill.evaluation.seed_statistics import t_interval

from .entries import Run

_SEED = re.compile(r"seed[-_]?(\d+)")


def family(folder: Path) -> str | None:
    """Return the name that a run shares with those of other seeds, the folder above ``seed<k>``; ``None`` otherwise."""
    return folder.parent.name if _SEED.fullmatch(folder.name) else None


def one_seed(runs: Sequence[Run]) -> list[Run]:
    """Return one run of each family, with the same seed as the first run where possible."""
    chosen: dict[str, Run] = {}
    for run in runs:
        name = family(run.folder) or run.label
        if name not in chosen or (run.folder.name == runs[0].folder.name != chosen[name].folder.name):
            chosen[name] = run
    return list(chosen.values())


@dataclass(frozen=True)
class Group:
    """Accuracies of a family's seeds, and their 95 % ``t``-interval ``mean ± half`` (``None`` for a single seed)."""

    name: str
    css: str
    values: list[float]
    mean: float
    half: float | None


def seed_groups(runs: Sequence[Run], data: str) -> list[Group]:
    """Return the families of the runs scored on ``data``; none if no family has two seeds."""
    found: dict[str, list[tuple[Run, float]]] = {}
    for run in runs:
        name, exact = family(run.folder), run.scores.get((data, "student"), {}).get("exact")
        if name is not None and exact is not None:
            found.setdefault(name, []).append((run, exact))
    if all(len(members) < 2 for members in found.values()):
        return []
    groups = []
    for name, members in found.items():
        values = [value for _, value in members]
        groups.append(Group(name, members[0][0].css, values, *t_interval(values)))
    return groups


def axis(groups: Sequence[Group], levels: Sequence[float]) -> dict[str, Any]:
    """Return an axis that fits all values and intervals: ``low``, ``high`` and ``place``, a position in per cent."""
    fitted = list(levels)
    for group in groups:
        half = group.half or 0
        fitted += [group.mean - half, group.mean + half, *group.values]
    low, high = min(fitted), max(fitted)
    margin = 0.06 * (high - low) or 0.01
    low, high = low - margin, high + margin
    return {"low": low, "high": high, "place": lambda value: 100 * (value - low) / (high - low)}
