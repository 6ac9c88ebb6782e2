"""Runs that differ by their seed alone are one training: group them, and compare the groups."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from vlm_distill.config.differences import SEED, flattened, without_seed
from vlm_distill.config.kinds import read_run

from .compare import choose_metric, find_predictions
from .crossed import Crossed, compare_crossed
from .predictions import Prediction
from .seed_statistics import SeedComparison, compare_seeds, deviation_of, verdicts

_SEED = re.compile(r"seed[-_]?\d+")


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ by their seed alone, by seed; models without a configuration are each a group."""

    name: str
    members: Mapping[int, Path]


@dataclass(frozen=True)
class Pair:
    """Two groups compared: over seeds, and over seeds and questions where both have several seeds.

    Attributes:
        first, second: their names; the differences are first minus second.
        seeds: over seeds.
        crossed: over seeds and questions.
        verdict: ``better``, ``worse``, ``no difference shown`` or ``too few seeds``, of the first.
    """

    first: str
    second: str
    seeds: SeedComparison
    crossed: Crossed | None
    verdict: str


def is_seed_folder(folder: Path) -> bool:
    """Return whether a folder is called ``seed3`` or the like, and its parent has the run's name."""
    return _SEED.fullmatch(folder.name) is not None


def same_training(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> list[dict[int, int]]:
    """Group runs that differ by their seed alone.

    Runs in folders ``<name>/seed<k>`` are one training only with others of that name. A run whose settings and seed
    another has, perhaps trained by another version, is a training of its own.

    Args:
        runs: folder and settings of each, flat or nested; without settings it is a training of its own.

    Returns:
        For each training, positions in ``runs`` by seed, in the order of first members.
    """
    groups: list[dict[int, int]] = []
    known: dict[tuple[str, str], dict[int, int]] = {}
    for place, (folder, settings) in enumerate(runs):
        seed = int(flattened(settings).get(SEED) or 0)
        above = str(folder.parent) if is_seed_folder(folder) else ""
        members = known.setdefault((above, without_seed(settings)), {}) if settings else {}
        if seed in members:
            members = {}
        if not members:
            groups.append(members)
        members[seed] = place
    return groups


def group_by_seed(paths: Sequence[Path]) -> list[SeedGroup]:
    """Group the folders of runs that differ by their seed alone; other paths are each a group.

    Raises:
        UserError: a configuration is damaged.
    """
    runs = []
    for path in paths:
        config = path / "config.yaml"
        settings = read_run(config) if config.is_file() else None
        runs.append((path.resolve(), settings if isinstance(settings, dict) else {}))
    trainings = same_training(runs)

    names = []
    for members in trainings:
        first = next(iter(members.values()))
        folder = runs[first][0]
        names.append(folder.parent.name if is_seed_folder(folder) else str(paths[first]))
    groups = []
    for name, members in zip(names, trainings, strict=True):
        found = {seed: paths[place] for seed, place in members.items()}
        groups.append(SeedGroup(name if names.count(name) == 1 else str(next(iter(found.values()))), found))
    return groups


@dataclass(frozen=True)
class GroupScores:
    """A group's mean scores by seed, 0…1, and their standard deviation; ``None`` for one seed."""

    name: str
    scores: Mapping[int, float]
    mean: float
    deviation: float | None


def compare_groups(groups: Sequence[SeedGroup], metric: str | None = None) -> tuple[list[GroupScores], list[Pair]]:
    """Return every group's scores, and all pairs of groups compared.

    Args:
        groups: runs by seed.
        metric: ``exact``, ``soft`` or ``score``; by default ``score`` if every run has scores, else ``exact``.

    Raises:
        UserError: a run has no predictions, or two groups no question in common.
    """
    answers: dict[str, dict[int, list[Prediction]]] = {}
    for group in groups:
        answers[group.name] = {seed: find_predictions(path) for seed, path in group.members.items()}
    every = [found for members in answers.values() for found in members.values()]
    kind = choose_metric(metric, every)

    # Only questions that all runs answered: means over others would compare questions.
    common = set.intersection(*({(p.source, p.index) for p in found} for found in every))
    for members in answers.values():
        for seed, found in members.items():
            members[seed] = [p for p in found if (p.source, p.index) in common and getattr(p, kind) is not None]
            if not members[seed]:
                raise UserError(f"compare: the runs have no question in common with a score called {kind}")

    summaries = []
    for name, members in answers.items():
        scores = {seed: _mean_score(found, kind) for seed, found in members.items()}
        values = list(scores.values())
        summaries.append(GroupScores(name, scores, sum(values) / len(values), deviation_of(values)))
    couples = list(itertools.combinations(summaries, 2))
    over_seeds = [compare_seeds(first.scores, second.scores, len(couples)) for first, second in couples]
    pairs = []
    for (first, second), seeds, verdict in zip(couples, over_seeds, verdicts(over_seeds), strict=True):
        crossed = compare_crossed(answers[first.name], answers[second.name], kind)
        pairs.append(Pair(first.name, second.name, seeds, crossed, verdict))
    return summaries, pairs


def _mean_score(predictions: Sequence[Prediction], metric: str) -> float:
    return math.fsum(getattr(p, metric) for p in predictions) / len(predictions)
