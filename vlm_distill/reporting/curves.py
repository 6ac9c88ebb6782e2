"""The report's charts: scores during training by step and by time, then every training metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import plots
from .entries import Run, is_number
from .language_sections import OF_LANGUAGE, title_of
from .teacher_sections import PREFIX

Chart = tuple[str, Markup]

#: Captions of the curves that every run has; other metrics are shown under their own names.
_CAPTIONS = {"loss": "Loss, weighted sum", "lr": "Learning rate", "grad_norm": "Gradient norm"}
#: (key in metrics.jsonl, key in scores.json, title)
_SCORES = [
    ("exact", "exact", "Accuracy"),
    ("score", "main", "Score"),
    *((key, key, title_of(key)) for key in OF_LANGUAGE),
]
#: What the short names of metrics mean.
_MEANINGS = {
    "t": "“t” is how far TAID’s target has moved, from the student’s own distribution (0) to the teacher’s (1)",
    "kl": "“kl” is how far the student is from what it is taught, in nats per token",
    "grad_norm": "Gradient norms are lengths before clipping",
}
#: The curves' names are collected from this many first lines of a run's metrics.
_LINES_FOR_NAMES = 50


def charts(runs: Sequence[Run], sections: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return (caption, chart) pairs. ``sections`` hold the final scores that are drawn as dashed levels."""
    found = []
    for key, final_key, title in _SCORES:
        found += _score_charts(runs, sections, key, final_key, title)
    found += [_metric_chart(runs, name) for name in _metric_names(runs)]
    return [(caption, chart) for caption, chart in found if chart]


def meanings(runs: Sequence[Run]) -> list[str]:
    """Return what the short names of the drawn metrics mean."""
    names: set[str] = set()
    for run in runs:
        for line in run.train[:_LINES_FOR_NAMES]:
            names |= {name.rpartition("/")[2] for name in line}
    return [text for name, text in _MEANINGS.items() if name in names]


def _score_charts(
    runs: Sequence[Run], sections: Sequence[Mapping[str, Any]], key: str, final_key: str, title: str
) -> list[Chart]:
    """Chart one score of each data set, by step and by time."""
    levels = {section["data"]: _levels(section, final_key) for section in sections}
    names: dict[str, None] = {}
    for run in runs:
        names |= dict.fromkeys(_data_of(line) for line in run.evaluations if key in line)
    found = []
    for data in names:
        # Name the data where there are several, and beside measures that mean nothing without it.
        suffix = f" · {data}" if len(names) > 1 or key != "exact" else ""
        for x, unit in (("step", "step"), ("seconds", "second")):
            curves = []
            for run in runs:
                lines = [line for line in run.evaluations if key in line and _data_of(line) == data]
                curves.append(_curve(run, lines, x, key))
            caption = f"{title} by {unit}{suffix}"
            percent = key in ("exact", "rouge_l")
            curves += levels.get(data, [])
            found.append((caption, plots.line_chart(caption, curves, x_label=f"{unit}s", percent=percent)))
    return found


def _levels(section: Mapping[str, Any], key: str) -> list[plots.Series]:
    """Return the scores of models that were not trained in these runs, as horizontal lines."""
    found = []
    for entry in section["entries"]:
        if entry.role != "student" and is_number(entry.scores.get(key)):
            found.append(plots.Series(entry.label, entry.css, [(0.0, entry.scores[key])], level=True))
    return found


def _data_of(line: Mapping[str, Any]) -> str:
    return str(line.get("data", ""))


def _metric_names(runs: Sequence[Run]) -> list[str]:
    """Return the metrics to draw: the loss, the terms' losses, the terms' other metrics, and the optimizer's."""
    names: dict[str, None] = {}
    for run in runs:
        for line in run.train[:_LINES_FOR_NAMES]:
            names |= dict.fromkeys(line)
    terms = sorted((name for name in names if "/" in name), key=lambda name: not name.endswith("/loss"))
    return ["loss", *terms, "lr", "grad_norm"]


def _metric_chart(runs: Sequence[Run], name: str) -> Chart:
    caption = _CAPTIONS.get(name) or name.replace("_", " ").replace("/", " · ")
    noisy = name == "grad_norm" or name.split("/")[-1] == "loss" or name.startswith(PREFIX)
    curves = [_curve(run, run.train, "step", name, smooth=noisy) for run in runs]
    return caption, plots.line_chart(caption, curves, x_label="steps")


def _curve(run: Run, lines: Sequence[Mapping[str, Any]], x: str, y: str, *, smooth: bool = False) -> plots.Series:
    points = [(float(line[x]), float(line[y])) for line in lines if is_number(line.get(x)) and is_number(line.get(y))]
    return plots.Series(run.label, run.css, points, smooth)
