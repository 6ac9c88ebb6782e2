"""The runs, models and comparisons that the report's sections are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm_distill.evaluation.compare import Comparison, paired
from vlm_distill.evaluation.kept_answers import teacher_name
from vlm_distill.evaluation.predictions import Prediction


@dataclass
class Run:
    """One training run, or one evaluation, as read from its folder.

    Attributes:
        evaluations_folder: holds a folder for each data set.
        training: the name that it shares with runs of other seeds, once :func:`~.seeds.name_trainings` has set it.
    """

    label: str
    css: str
    folder: Path
    evaluations_folder: Path
    config: str
    settings: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    scores: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    predictions: dict[tuple[str, str], list[Prediction]] = field(default_factory=dict)
    training: str = ""

    @property
    def seed(self) -> int:
        """Return the run's seed."""
        return int(self.settings.get("training.seed") or 0)

    @property
    def verb(self) -> str:
        """Return the ``vlm-distill`` command that repeats the run."""
        classifier = any(found.get("kind") == "classification" for found in self.scores.values())
        return "classify" if classifier or " classify " in str(self.summary.get("command", "")) else "train"


@dataclass
class Entry:
    """One model's scores on one data set. ``role`` is student, teacher or baseline."""

    role: str
    label: str
    css: str
    scores: Mapping[str, Any]
    predictions: list[Prediction]
    parameters: int | None = None


@dataclass
class Duel:
    """Two models compared on the same questions, with an axis from ``-reach`` to ``reach`` that fits the interval."""

    first: Entry
    second: Entry
    result: Comparison
    reach: float

    def place(self, value: float) -> float:
        """Return where a difference is on the axis, in per cent of its length."""
        return 50 + 50 * value / self.reach


def entries_on(runs: Sequence[Run], data: str, baselines: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """Return the teachers, students and baselines with scores on ``data``.

    Runs in one report share their teachers: the first run that scored one supplies its scores.
    """
    entries = []
    known: set[str] = set()
    for run in runs:
        for key in run.scores:
            name = teacher_name(key[1])
            if key[0] != data or name is None or name in known:
                continue
            known.add(name)
            # The summary has the parameters of all teachers together.
            count = None if name else run.summary.get("parameters", {}).get("teacher")
            label = f"Teacher · {name}" if name else "Teacher"
            entries.append(Entry("teacher", label, "teacher", run.scores[key], run.predictions[key], count))
    for run in runs:
        key = data, "student"
        if key in run.scores:
            count = run.summary.get("parameters", {}).get("student")
            label = run.label if len(runs) > 1 else f"Student · {run.label}"
            entries.append(Entry("student", label, run.css, run.scores[key], run.predictions[key], count))
    return entries + [Entry("baseline", name, "baseline", scores, []) for name, scores in baselines.items()]


def duel(first: Entry, second: Entry, metric: Literal["exact", "score"] = "exact") -> Duel:
    """Compare two models' predictions."""
    result = paired(first.predictions, second.predictions, metric)
    return Duel(first, second, result, max(abs(result.low), abs(result.high), 0.001) * 1.15)


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
