"""A benchmark's result, and the files it is written to: ``scores.json``, ``scores.csv`` and predictions."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.batch import Problem

from .benchmark_entry import Benchmark
from .benchmarks import LEADERBOARD
from .predictions import Prediction, write_predictions
from .scoring.leaderboard import suite_average
from .scoring.scores import Scores
from .vlmevalkit_files import default_format, prediction_file, write_prediction_file


@dataclass(frozen=True)
class Result:
    """One benchmark's answers and scores.

    Attributes:
        benchmark: its name.
        metric: the usual name of the main score.
        rules: whose rules scored it.
        predictions: with their scores.
        scores: ``None`` if the right answers are not published, or for the reason in ``failure``.
        skipped: questions that could not be asked, and answers that cannot be scored without the rest of their group.
        out_of: the main score of a model that is always right on these questions.
        questions: number of questions in the benchmark's files.
        limited: whether a limit left some of them out.
        failure: why there are no scores, in one line.
    """

    benchmark: str
    metric: str
    rules: str
    predictions: list[Prediction]
    scores: Scores | None
    skipped: list[Problem]
    out_of: float = 100.0
    questions: int = 0
    limited: bool = False
    failure: str | None = None

    @property
    def n(self) -> int:
        """Number of answers that were scored."""
        return len(self.predictions) if self.scores is None else len(self.scores.rows)

    @property
    def cut(self) -> int:
        """Number of answers that were cut before their end."""
        return sum(not p.complete for p in self.predictions)

    @property
    def whole(self) -> bool:
        """Whether all of the benchmark's questions were scored."""
        return self.scores is not None and not self.limited and not self.skipped

    def notes(self) -> list[str]:
        """Return short remarks on the scores, except on cut answers, which have a column of their own."""
        notes = []
        if self.failure is not None:
            notes.append(f"not scored: {self.failure}")
        elif self.scores is None:
            notes.append("right answers are not published: predictions only")
        if self.limited:
            notes.append(f"limited: {self.n + len(self.skipped):,} of {self.questions:,} questions")
        if self.skipped:
            notes.append(f"{len(self.skipped):,} left out")
        if self.scores is not None:
            notes += [f"{count:,} decided by {reason}" for reason, count in self.scores.fallbacks.items() if count]
            if self.scores.judge:
                count = len(self.scores.judge)
                notes.append(f"{count:,} {'answer needs' if count == 1 else 'answers need'} a judge (--judge)")
        return notes


def average(results: Sequence[Result]) -> float | None:
    """Return the Open VLM Leaderboard's average, defined over eight benchmarks by VLMEvalKit's rules.

    ``None`` unless all eight are there, each with all of its questions scored by these rules.
    """
    names = LEADERBOARD
    usable = [r for r in results if r.benchmark in names and r.rules == "vlmevalkit" and r.whole]
    return suite_average({names[r.benchmark]: r.scores.main for r in usable if r.scores is not None})


def summary(result: Result) -> dict[str, Any]:
    """Return a result without its answers, for ``scores.json``; NaN and infinity become ``None``."""
    plain: dict[str, Any] = {"benchmark": result.benchmark, "rules": result.rules, "n": result.n}
    plain["skipped"] = dict(Counter(problem.reason for problem in result.skipped))
    plain["cut"] = result.cut
    if result.limited:
        plain["limited_from"] = result.questions
    if result.failure is not None:
        plain["failure"] = result.failure
    if result.scores is None:
        return plain
    found = asdict(result.scores)
    del found["rows"]
    return _finite(
        plain | found | {"metric": result.metric, "out_of": result.out_of, "judge": len(result.scores.judge)}
    )


def write_summary(folder: Path, results: Sequence[Result], failures: Mapping[str, str] | None = None) -> None:
    """Write ``scores.json`` and ``scores.csv`` of several benchmarks.

    ``scores.json`` also has the leaderboard's average, and why other benchmarks could not be used (``failures``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"benchmarks": [summary(r) for r in results], "average": average(results), "failures": failures or {}}
    (folder / "scores.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _write_csv(folder / "scores.csv", results)


def write_result(out: Path, result: Result, entry: Benchmark, rows: list[dict[str, Any]], name: str) -> None:
    """Write a benchmark's answers and scores into a folder of its own."""
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(out / "predictions.jsonl", result.predictions)
    (out / "scores.json").write_text(json.dumps(summary(result), indent=2, ensure_ascii=False) + "\n", "utf-8")
    _write_csv(out / "scores.csv", [result])
    path = prediction_file(out, name, entry.dataset, default_format())
    answers = [row["prediction"] for row in rows]
    write_prediction_file(path, [{k: v for k, v in row.items() if k != "prediction"} for row in rows], answers)


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["benchmark", "rules", "group", "metric", "score", "out_of", "n", "limited_from", "cut"])
        for result in results:
            if result.scores is None:
                continue
            first = [result.benchmark, result.rules]
            last = [result.n, result.questions if result.limited else "", result.cut]
            writer.writerow([*first, "", result.metric, result.scores.main, result.out_of, *last])
            tables = {"": result.scores.overall} | dict(result.scores.groups)
            for group, row in tables.items():
                writer.writerows([*first, group, key, value, "", *last] for key, value in row.items())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
