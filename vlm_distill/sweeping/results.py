"""What a sweep's finished runs measured: their final scores, time and memory, as rows of a table and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.saved_json import read_object
from vlm_distill.evaluation.measures import MEASURES

from .record import RecordedRun, SweepRecord

#: Data set, and key of its ``scores.json``.
Score = tuple[str, str]
#: Scores of a classifier that stand beside its accuracy.
_BESIDE = ("top5", "nll", "ece", "agreement")


@dataclass(frozen=True)
class Result:
    """A finished run: its scores as in ``scores.json``, and what it cost.

    Attributes:
        by_type: of questions of one type, whose data set is called ``data.type``; for the CSV.
    """

    run: RecordedRun
    scores: Mapping[Score, float]
    by_type: Mapping[Score, float]
    seconds: float | None
    peak_bytes: float | None
    parameters: Mapping[str, int]


def read_results(sweep: SweepRecord) -> list[Result]:
    """Return the results of all runs that are finished, in the sweep's order.

    Raises:
        UserError: a file of a run is damaged.
    """
    return [_read_result(run) for run in sweep.runs if run.done]


def _read_result(run: RecordedRun) -> Result:
    summary = read_object(run.folder / "summary.json")
    memory = summary.get("memory", {}).get("peak_bytes")
    parameters = summary.get("parameters", {})
    return Result(run, *_read_scores(run.folder), summary.get("seconds"), memory, parameters)


def final_scores(run: Path) -> dict[Score, float]:
    """Return a run's scores at its end. Raise ``UserError`` for a damaged file."""
    return _read_scores(run)[0]


def _read_scores(run: Path) -> tuple[dict[Score, float], dict[Score, float]]:
    """Return a run's scores, and those of its questions by type."""
    scores: dict[Score, float] = {}
    by_type: dict[Score, float] = {}
    for path in sorted(run.glob("evaluation/*/student/scores.json")):
        data, found = path.parent.parent.name, read_object(path)
        for name in (*MEASURES, *_BESIDE):
            if isinstance(found.get(name), int | float) and _wanted(name, found):
                scores[data, name] = float(found[name])
        for kind, values in found.get("by_type", {}).items():
            if isinstance(values.get("exact"), int | float) and _wanted("exact", found):
                by_type[f"{data}.{kind}", "exact"] = float(values["exact"])
    return scores, by_type


def _wanted(name: str, scores: Mapping[str, Any]) -> bool:
    """Return whether a score was asked for: a source measured by perplexity alone counts no right answers."""
    return name != "exact" or "exact" in scores.get("measures", ["exact"])


def main_scores(scores: Iterable[Mapping[Score, float]]) -> list[Score]:
    """Return every score that tables show and that one of these runs has, in a fixed order."""
    found: dict[Score, None] = {}
    for one in scores:
        found |= dict.fromkeys(key for key in one if key[1] in MEASURES)
    return sorted(found, key=lambda key: (key[0], list(MEASURES).index(key[1])))


def write_csv(path: Path, sweep: SweepRecord, results: Sequence[Result]) -> None:
    """Write a row for each finished run: its choices, seed, scores in full precision, seconds and peak memory."""
    scores = sorted(dict.fromkeys(key for result in results for key in [*result.scores, *result.by_type]))
    columns = [*sweep.axes, "seed", *(f"{data}.{name}" for data, name in scores)]
    columns += ["seconds", "peak_bytes", "student_parameters", "teacher_parameters", "folder"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for result in results:
            row: dict[str, Any] = {**result.run.setting, "seed": result.run.seed}
            row |= {f"{data}.{name}": value for (data, name), value in {**result.scores, **result.by_type}.items()}
            row |= {"seconds": result.seconds, "peak_bytes": result.peak_bytes}
            row |= {f"{who}_parameters": result.parameters.get(who) for who in ("student", "teacher")}
            writer.writerow(row | {"folder": result.run.folder})


def in_words(run: Path) -> str:
    """Return a finished run's scores in words."""
    scores = final_scores(run)
    parts = []
    for data, name in main_scores([scores]):
        measure = MEASURES[name]
        parts.append(f"{data}: {measure.heading} {measure.scale * scores[data, name]:.4g}")
    return ", ".join(parts) or "finished"
