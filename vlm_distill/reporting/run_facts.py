"""What the report says of runs as wholes: the headline, speed and memory, and settings that differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import plots
from .entries import Entry, Run, is_number

#: Label, path in summary.json, format.
_SUMMARY: tuple[tuple[str, tuple[str, ...], Callable[[Any], str]], ...] = (
    ("Device", ("device",), str),
    ("Ranks", ("ranks",), str),
    ("Steps", ("steps",), "{:,}".format),
    ("Time", ("seconds",), plots.duration),
)
#: Label, key of the training metrics, format.
_MEDIANS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("Tokens per second (median)", "tokens_per_second", plots.compact),
    ("Images per second (median)", "images_per_second", plots.compact),
    ("FLOPs per second (median)", "flops_per_second", "{:.3g}".format),
    ("MFU (median)", "mfu", plots.percent),
    ("Waiting for data (median)", "waiting", plots.percent),
)
_DATA_AND_SIZES: tuple[tuple[str, tuple[str, ...], Callable[[Any], str]], ...] = (
    ("Rows left out", ("left_out",), "{:.1%}".format),
    ("Empty steps", ("empty_steps",), lambda value: f"{value:,}" if value else ""),
    ("Peak memory of a rank", ("memory", "peak_bytes"), plots.size_in_bytes),
    ("Parameters, student", ("parameters", "student"), "{:,}".format),
    ("Parameters, trained", ("parameters", "trained"), "{:,}".format),
    ("Parameters, teacher", ("parameters", "teacher"), "{:,}".format),
)

Row = tuple[str, list[str]]


def headline(runs: Sequence[Run], entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the figures of the first sentence: sizes of the first run's models, and scores from ``entries``."""
    sizes = runs[0].summary.get("parameters", {})
    student = next((entry for entry in entries if entry.role == "student"), None)
    scored = [entry for entry in entries if entry.role == "teacher"]
    named = {key.split(".")[1] for key in runs[0].settings if key.startswith("teachers.")}
    return {
        "student": sizes.get("student"),
        "teacher": sizes.get("teacher"),
        "share": sizes["student"] / sizes["teacher"] if sizes.get("student") and sizes.get("teacher") else None,
        "accuracy": student and student.scores.get("exact"),
        "n": student and student.scores.get("n"),
        "teachers": len(named),
        "teacher_accuracy": scored[0].scores.get("exact") if len(scored) == 1 else None,
    }


def speed_and_memory(runs: Sequence[Run]) -> list[Row]:
    """Return rows of a label and one text per run, without rows that are empty for every run."""
    rows: list[Row] = []
    for label, path, show in _SUMMARY:
        rows.append((label, [_from_summary(run, path, show) for run in runs]))
    for label, key, show in _MEDIANS:
        rows.append((label, [_median(run, key, show) for run in runs]))
    for label, path, show in _DATA_AND_SIZES:
        rows.append((label, [_from_summary(run, path, show) for run in runs]))
    rows += _answers_per_second(runs)
    return [(label, texts) for label, texts in rows if any(texts)]


def _answers_per_second(runs: Sequence[Run]) -> list[Row]:
    """Return how fast student and teachers answered on each data set, all at once on the run's ranks."""
    keys: dict[tuple[str, str], None] = {}
    for run in runs:
        for data, speeds in run.summary.get("answers_per_second", {}).items():
            keys |= dict.fromkeys((data, who) for who in speeds)
    rows = []
    for data, who in keys:
        texts = [_from_summary(run, ("answers_per_second", data, who), plots.compact) for run in runs]
        rows.append((f"Answers per second on {data}, {who.replace('_', ' ')}", texts))
    return rows


def _from_summary(run: Run, path: Sequence[str], show: Callable[[Any], str]) -> str:
    value: Any = run.summary
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "" if value is None else show(value)


def _median(run: Run, key: str, show: Callable[[Any], str]) -> str:
    values = sorted(line[key] for line in run.train if is_number(line.get(key)))
    return show(values[len(values) // 2]) if values else ""


def differing_settings(runs: Sequence[Run]) -> list[Row]:
    """Return the settings in which the runs differ, with one text per run."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        texts = [str(run.settings[key]) if key in run.settings else "–" for run in runs]
        if len(set(texts)) > 1:
            rows.append((key, texts))
    return rows
