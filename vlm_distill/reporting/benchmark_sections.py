"""The report's sections on benchmarks: main scores, groups, models against each other, examples where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill.evaluation.judge import UNREADABLE
from vlm_distill.evaluation.pictures import find_picture

from .entries import Duel, Entry, Run, duel, entries_on

_CARDS = 6
_GROUPS = ("Students differ", "Teacher scores higher", "Student scores higher")


def is_benchmark(scores: Mapping[str, Any]) -> bool:
    """Whether a ``scores.json`` is a benchmark's and not a data source's."""
    return "benchmark" in scores


def benchmark_sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A section for each benchmark and rules: scores by different rules do not compare.

    Benchmarks whose right answers are not published have none.
    """
    scored = dict.fromkeys(
        (data, found["rules"])
        for run in runs
        for (data, _), found in run.scores.items()
        if is_benchmark(found) and "main" in found
    )
    return [_section(runs, data, rules) for data, rules in scored]


def not_scored(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return which answers of which run's models to which benchmark could not be scored, and why."""
    return [
        {"run": run.label, "data": data, "who": who, "reason": found["failure"]}
        for run in runs
        for (data, who), found in run.scores.items()
        if is_benchmark(found) and found.get("failure")
    ]


def _section(runs: Sequence[Run], data: str, rules: str) -> dict[str, Any]:
    sharing = [
        run for run in runs if any(key[0] == data and found.get("rules") == rules for key, found in run.scores.items())
    ]
    entries = [e for e in entries_on(sharing, data, {}) if e.scores.get("rules") == rules and "main" in e.scores]
    answered = [entry for entry in entries if entry.predictions]
    folders = [run.folder / "evaluation" / data / "pictures" for run in sharing]
    return {
        "data": data,
        "rules": rules,
        "metric": entries[0].scores["metric"],
        "out_of": max(entry.scores.get("out_of", 100.0) for entry in entries),
        "entries": entries,
        "unreadable": UNREADABLE,
        "tables": _tables(entries),
        "duels": _duels(answered),
        "gallery": _gallery(answered, folders),
    }


def _tables(entries: Sequence[Entry]) -> list[tuple[str, list[tuple[str, list[float | None]]]]]:
    """(title, rows of name and one value a model): the whole, then every group that a model has."""
    tables = []
    names = dict.fromkeys(name for entry in entries for name in entry.scores.get("groups", {}))
    for title in ["", *names]:
        found = [
            e.scores.get("overall", {}) if not title else e.scores.get("groups", {}).get(title, {}) for e in entries
        ]
        keys = dict.fromkeys(key for values in found for key in values)
        if keys:
            tables.append((title, [(key, [values.get(key) for values in found]) for key in keys]))
    return tables


def _duels(entries: Sequence[Entry]) -> list[Duel]:
    """The first student against the teacher and every other student, where both have scores of one question."""
    students = [entry for entry in entries if entry.role == "student"]
    if not students:
        return []
    first = students[0]
    others = [entry for entry in entries if entry.role == "teacher"] + students[1:]
    return [duel(first, other, "score") for other in others if _scored(first).keys() & _scored(other).keys()]


def _scored(entry: Entry) -> dict[int, float]:
    return {p.index: p.score for p in entry.predictions if p.score is not None}


def _gallery(entries: Sequence[Entry], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Questions on which the models score differently, in groups by who is better."""
    if not entries:
        return []
    scores = [_scored(entry) for entry in entries]
    common = sorted(set[int].intersection(*map(set, scores)))
    rows: dict[str, list[int]] = {name: [] for name in _GROUPS}
    for index in common:
        teacher = [s[index] for s, entry in zip(scores, entries, strict=True) if entry.role == "teacher"]
        students = [s[index] for s, entry in zip(scores, entries, strict=True) if entry.role == "student"]
        if len(set(students)) > 1:
            rows["Students differ"].append(index)
        elif teacher and students and teacher[0] != students[0]:
            rows[_GROUPS[1] if teacher[0] > students[0] else _GROUPS[2]].append(index)
    answers = [{p.index: p for p in entry.predictions} for entry in entries]
    files = {index: find_picture(answers[0][index].image, folders) for chosen in rows.values() for index in chosen}
    groups = []
    for name, found in rows.items():
        # Those that can be seen, if any can, and of them the middles of equal stretches, as in the other galleries.
        seen = [index for index in found if files[index] is not None] or found
        count = min(_CARDS, len(seen))
        cards = [
            {"answers": [(e, by_index[i]) for e, by_index in zip(entries, answers, strict=True)], "picture": files[i]}
            for i in (seen[(2 * k + 1) * len(seen) // (2 * count)] for k in range(count))
        ]
        if cards:
            groups.append({"name": name, "count": len(found), "of": len(common), "cards": cards})
    return groups
