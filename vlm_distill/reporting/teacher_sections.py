"""The report's sections on several teachers: each one's share of what was compared, and its losses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .entries import Run, is_number

#: Metrics of several teachers are called ``teacher/NAME/share`` and ``teacher/NAME/LOSS``.
PREFIX = "teacher/"
_SHARE = "share"


def teacher_sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a section for each run with several teachers: the ``run``, the names of its ``losses``, and ``rows``.

    A row is a teacher's name (``A+B`` for a mixture), its share of the compared tokens as a mean over steps, and for
    each loss its means over the first and the last tenth of the steps in which this teacher taught.
    """
    sections = []
    for run in runs:
        keys = _keys(run)
        names = list(dict.fromkeys(name for name, _ in keys))
        losses = list(dict.fromkeys(key for _, key in keys if key != _SHARE))
        rows = []
        for name in names:
            shares = _values(run, name, _SHARE)
            means = [_first_and_last(_values(run, name, loss)) for loss in losses]
            rows.append((name, statistics.fmean(shares) if shares else None, means))
        if rows:
            sections.append({"run": run, "losses": losses, "rows": rows})
    return sections


def _keys(run: Run) -> list[tuple[str, str]]:
    """Return the names of teachers with what was measured of each, in the order of the metrics."""
    found: dict[tuple[str, str], None] = {}
    for line in run.train:
        for metric in line:
            if metric.startswith(PREFIX) and metric.count("/") == 2:
                _, name, key = metric.split("/")
                found[name, key] = None
    return list(found)


def _values(run: Run, name: str, key: str) -> list[float]:
    metric = f"{PREFIX}{name}/{key}"
    return [float(line[metric]) for line in run.train if is_number(line.get(metric))]


def _first_and_last(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the means of the first and the last tenth of some values; ``None`` if there are none."""
    if not values:
        return None
    few = max(1, len(values) // 10)
    return statistics.fmean(values[:few]), statistics.fmean(values[-few:])
