"""The report's sections on data with right answers: scores, question types, students compared, and a gallery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .benchmark_sections import is_benchmark
from .class_sections import is_classification
from .entries import Duel, Entry, Run, duel, entries_on
from .gallery import gallery
from .language_sections import has_answers
from .seeds import one_of_each, seed_board


def answer_sections(runs: Sequence[Run], baselines: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a section for each data set; ``baselines`` are shown in the first."""
    names: dict[str, None] = {}
    for run in runs:
        for (data, _), scores in run.scores.items():
            if not is_benchmark(scores) and not is_classification(scores) and has_answers(scores):
                names[data] = None
    return [_section(runs, data, {} if k else baselines) for k, data in enumerate(names)]


def _section(runs: Sequence[Run], data: str, baselines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    entries = entries_on(runs, data, baselines)
    shown = one_of_each(entries, runs, data)
    return {
        "data": data,
        "entries": entries,
        "shown": shown,
        "seeds": seed_board(runs, data),
        "kinds": list(dict.fromkeys(kind for entry in entries for kind in entry.scores.get("by_type", {}))),
        "no_better": _no_better(shown),
        "duels": _duels([entry for entry in shown if entry.role == "student"]),
        "gallery": gallery([entry for entry in shown if entry.predictions]),
    }


def _no_better(entries: Sequence[Entry]) -> list[str]:
    """Say on which types of questions the first student is not shown to be better than a baseline."""
    student = next((entry for entry in entries if entry.role == "student"), None)
    found = []
    for baseline in entries:
        if student is None or baseline.role != "baseline":
            continue
        for kind, scores in student.scores.get("by_type", {}).items():
            other = baseline.scores.get("by_type", {}).get(kind, {}).get("exact")
            low, _ = scores.get("interval") or (None, None)
            if other is not None and low is not None and low <= other:
                found.append(
                    f"On {kind} questions, {student.label} ({scores['exact']:.1%}) is not shown to be better than "
                    f"{baseline.label} ({other:.1%})."
                )
    return found


def _duels(students: Sequence[Entry]) -> list[Duel]:
    """Compare the first student with each other one."""
    if not students or not students[0].predictions:
        return []
    return [duel(students[0], other) for other in students[1:] if other.predictions]


def best_student(entries: Sequence[Entry], kind: str | None) -> Entry | None:
    """Return the student with the highest score, if there are several and no tie.

    Args:
        entries: models scored on the same data.
        kind: the type of questions; ``None``: all of them.
    """
    scored = []
    for entry in entries:
        scores = entry.scores if kind is None else entry.scores.get("by_type", {}).get(kind, {})
        if entry.role == "student" and scores.get("exact") is not None:
            scored.append((scores["exact"], entry))
    if len(scored) < 2:
        return None
    highest = max(value for value, _ in scored)
    best = [entry for value, entry in scored if value == highest]
    return best[0] if len(best) == 1 else None
