"""Runs that differ by their seed alone, as one training: means, intervals, and trainings compared over their seeds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_distill.evaluation.measures import MEASURES
from vlm_distill.evaluation.seed_groups import is_seed_folder, same_training
from vlm_distill.evaluation.seed_statistics import SeedComparison, compare_seeds, deviation_of, t_interval, verdicts

from . import plots
from .entries import Entry, Run


def name_trainings(runs: Sequence[Run]) -> list[str]:
    """Set each run's ``training``: the name that it shares with runs of other seeds. Return the names in order."""
    names = []
    for members in same_training([(run.folder, run.settings) for run in runs]):
        first = runs[next(iter(members.values()))]
        name = first.folder.parent.name if is_seed_folder(first.folder) and len(members) > 1 else first.label
        name = first.label if name in names else name
        names.append(name)
        for place in members.values():
            runs[place].training = name
    return names


def one_seed(runs: Sequence[Run]) -> list[Run]:
    """Return one run of each training, with the same seed as the first run where possible."""
    chosen: dict[str, Run] = {}
    for run in runs:
        if run.training not in chosen or (run.seed == runs[0].seed != chosen[run.training].seed):
            chosen[run.training] = run
    return list(chosen.values())


def one_of_each(entries: Sequence[Entry], runs: Sequence[Run], data: str) -> list[Entry]:
    """Return the entries with one run of each training, for comparisons of single questions."""
    if len(runs) < 2:
        return list(entries)
    chosen = {run.label for run in one_seed([run for run in runs if (data, "student") in run.scores])}
    return [entry for entry in entries if entry.role != "student" or entry.label in chosen]


@dataclass(frozen=True)
class Group:
    """A training's scores by seed, as tables show them, and their 95 % ``t``-interval ``mean ± half``."""

    name: str
    css: str
    scores: Mapping[int, float]
    mean: float
    half: float | None
    deviation: float | None


@dataclass(frozen=True)
class Pair:
    """Two trainings compared over seeds; the verdict is about the first."""

    first: Group
    second: Group
    found: SeedComparison
    verdict: str

    @property
    def difference(self) -> str:
        """Return the difference with its interval, as text."""
        return plots.spread(self.found.difference, self.found.half, sign="+")

    @property
    def needed(self) -> str:
        """Return how many seeds would show it, as text."""
        return plots.needed(self.found, self.verdict)


def seed_board(runs: Sequence[Run], data: str, key: str = "exact") -> dict[str, Any] | None:
    """Return what a page shows of seeds: ``groups``, ``pairs``, ``axis``, ``teacher``, and ``heading``.

    Args:
        runs: with their trainings named.
        data: name of the data set or benchmark.
        key: of the score in ``scores.json``.

    Returns:
        ``None`` if no training has two seeds with this score.
    """
    measure = MEASURES[key]
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.scores.get((data, "student"), {}).get(key) is not None:
            found.setdefault(run.training, []).append(run)
    if all(len(members) < 2 for members in found.values()):
        return None
    groups = []
    for name, members in found.items():
        scores = {run.seed: measure.scale * run.scores[data, "student"][key] for run in members}
        values = list(scores.values())
        groups.append(Group(name, members[0].css, scores, *t_interval(values), deviation_of(values)))
    taught = [run.scores.get((data, "teacher"), {}).get(key) for run in runs]
    teacher = next((measure.scale * value for value in taught if value is not None), None)
    return {
        "groups": groups,
        "pairs": _pairs(groups, lower=measure.lower),
        "axis": axis(groups, [] if teacher is None else [teacher]),
        "teacher": teacher,
        "heading": measure.heading,
        "sign": " %" if measure.unit == "%" else "",
    }


def _pairs(groups: Sequence[Group], *, lower: bool) -> list[Pair]:
    """Compare all pairs, with Holm's correction over them."""
    couples = list(itertools.combinations(groups, 2))
    found = [compare_seeds(first.scores, second.scores, len(couples)) for first, second in couples]
    told = verdicts(found, lower=lower)
    return [Pair(*couple, one, said) for couple, one, said in zip(couples, found, told, strict=True)]


def axis(groups: Sequence[Group], levels: Sequence[float]) -> dict[str, Any]:
    """Return an axis that fits all values and intervals: ``low``, ``high`` and ``place``, a position in per cent."""
    fitted = list(levels)
    for group in groups:
        half = group.half or 0
        fitted += [group.mean - half, group.mean + half, *group.scores.values()]
    low, high = min(fitted), max(fitted)
    margin = 0.06 * (high - low) or 0.01
    low, high = low - margin, high + margin
    return {"low": low, "high": high, "place": lambda value: 100 * (value - low) / (high - low)}
