"""The report's sections on held-out answers and texts: perplexity, KL to the teacher, ROUGE-L."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .entries import Run, entries_on

#: Title of each measure, and whether lower is better.
MEASURES = {
    "perplexity": ("Perplexity", True),
    "kl": ("KL to the teacher, nats per token", True),
    "rouge_l": ("ROUGE-L", False),
}


def has_answers(scores: Mapping[str, Any]) -> bool:
    """Return whether a data set's scores count right answers."""
    return "exact" in scores.get("measures", ["exact"])


def language_sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a section for each data set: ``data``, ``entries``, ``rows``, ``n`` and ``tokens``.

    A row is a measure's title, one text per model, and whether each is the best student's.
    """
    names: dict[str, None] = {}
    for run in runs:
        for (data, _), scores in run.scores.items():
            if "measures" in scores:
                names[data] = None
    sections = []
    for data in names:
        entries = entries_on(runs, data, {})
        rows = []
        for name, (title, less) in MEASURES.items():
            values = [entry.scores.get(name) for entry in entries]
            if all(value is None for value in values):
                continue
            of_students = [value for entry, value in zip(entries, values, strict=True) if entry.role == "student"]
            students = [value for value in of_students if value is not None]
            best = None
            if len(students) > 1:
                best = min(students) if less else max(students)
            rows.append((title, [_shown(name, value) for value in values], [value == best for value in values]))
        if rows:
            first = entries[0].scores
            counts = {"n": first.get("n"), "tokens": first.get("tokens")}
            sections.append({"data": data, "entries": entries, "rows": rows, **counts})
    return sections


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "rouge_l":
        return f"{value:.1%}"
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"
