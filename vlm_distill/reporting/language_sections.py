"""The report's sections on held-out answers and texts: perplexity, KL to the teacher, ROUGE-L."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_distill.evaluation.measures import MEASURES

from .entries import Run, entries_on
from .seeds import seed_board

#: Shown in this order.
OF_LANGUAGE = {name: MEASURES[name] for name in ("perplexity", "kl", "rouge_l")}


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
        for name, measure in OF_LANGUAGE.items():
            values = [entry.scores.get(name) for entry in entries]
            if all(value is None for value in values):
                continue
            of_students = [value for entry, value in zip(entries, values, strict=True) if entry.role == "student"]
            students = [value for value in of_students if value is not None]
            best = None
            if len(students) > 1:
                best = min(students) if measure.lower else max(students)
            rows.append(
                (title_of(name), [_shown(name, value) for value in values], [value == best for value in values])
            )
        if rows:
            first = entries[0].scores
            counts = {"n": first.get("n"), "tokens": first.get("tokens")}
            boards = [seed_board(runs, data, name) for name in OF_LANGUAGE]
            seeds = [board for board in boards if board is not None]
            sections.append({"data": data, "entries": entries, "rows": rows, "seeds": seeds, **counts})
    return sections


def title_of(name: str) -> str:
    """Return a measure's title, without a per cent sign, which its values have."""
    return OF_LANGUAGE[name].heading.removesuffix(", %")


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "rouge_l":
        return f"{value:.1%}"
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"
