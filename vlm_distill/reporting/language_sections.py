"""The report's section of what is measured on held-out answers and texts: perplexity, KL to the teacher, ROUGE-L."""

from __future__ import annotations

from typing import Any

from .entries import Run, entries_on

#: Title of each measure, and whether less of it is better.
MEASURES = {
    "perplexity": ("Perplexity", True),
    "kl": ("KL to the teacher, nats a token", True),
    "rouge_l": ("ROUGE-L", False),
}


def has_answers(scores: dict[str, Any]) -> bool:
    """Whether a data set's scores are of answers that are right or wrong."""
    return "exact" in scores.get("measures", ["exact"])


def language_sections(runs: list[Run]) -> list[dict[str, Any]]:
    """A section for each data set: ``data``, ``entries``, ``rows`` of a measure's title, texts and which is best."""
    names = dict.fromkeys(data for run in runs for (data, _), scores in run.scores.items() if "measures" in scores)
    sections = []
    for data in names:
        entries = entries_on(runs, data, {})
        rows = []
        for name, (title, less) in MEASURES.items():
            values = [entry.scores.get(name) for entry in entries]
            known = [v for entry, v in zip(entries, values, strict=True) if v is not None and entry.role == "student"]
            if any(value is not None for value in values):
                best = (min if less else max)(known) if len(known) > 1 else None
                rows.append((title, [_shown(name, value) for value in values], [value == best for value in values]))
        if rows:
            counts = [(entry.scores.get("n"), entry.scores.get("tokens")) for entry in entries]
            sections.append({"data": data, "entries": entries, "rows": rows, "n": counts[0][0], "tokens": counts[0][1]})
    return sections


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if name == "rouge_l" else f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"
