"""The report's sections on benchmarks: main scores, groups, models compared, and examples where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill.evaluation.judge import UNREADABLE
from vlm_distill.evaluation.pictures import find_picture

from .entries import Duel, Entry, Run, duel, entries_on
from .gallery import CARDS, by_index, evenly_spaced
from .seeds import one_of_each, seed_board

_GROUPS = ("Students differ", "Teacher scores higher", "Student scores higher")
_STUDENTS_DIFFER, _TEACHER_HIGHER, _STUDENT_HIGHER = _GROUPS


def is_benchmark(scores: Mapping[str, Any]) -> bool:
    """Return whether a ``scores.json`` is about a benchmark and not about a data source."""
    return "benchmark" in scores


def benchmark_sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a section for each benchmark and set of rules, since scores by different rules do not compare.

    Benchmarks whose right answers are not published have no section.
    """
    scored: dict[tuple[str, str], None] = {}
    for run in runs:
        for (data, _), scores in run.scores.items():
            if is_benchmark(scores) and "main" in scores:
                scored[data, scores["rules"]] = None
    return [_section(runs, data, rules) for data, rules in scored]


def not_scored(runs: Sequence[Run]) -> list[dict[str, str]]:
    """List the benchmark answers that could not be scored, by run and model, with the reason."""
    found = []
    for run in runs:
        for (data, who), scores in run.scores.items():
            if is_benchmark(scores) and scores.get("failure"):
                found.append({"run": run.label, "data": data, "who": who, "reason": scores["failure"]})
    return found


def _section(runs: Sequence[Run], data: str, rules: str) -> dict[str, Any]:
    sharing = [run for run in runs if rules in _rules_used(run, data)]
    entries = [e for e in entries_on(sharing, data, {}) if e.scores.get("rules") == rules and "main" in e.scores]
    answered = [entry for entry in one_of_each(entries, sharing, data) if entry.predictions]
    folders = [run.evaluations_folder / data / "pictures" for run in sharing]
    return {
        "data": data,
        "rules": rules,
        "metric": entries[0].scores["metric"],
        "out_of": max(entry.scores.get("out_of", 100.0) for entry in entries),
        "entries": entries,
        "seeds": seed_board(sharing, data, "main"),
        "unreadable": UNREADABLE,
        "tables": _tables(entries),
        "duels": _duels(answered),
        "gallery": _gallery(answered, folders),
    }


def _rules_used(run: Run, data: str) -> set[Any]:
    return {scores.get("rules") for (name, _), scores in run.scores.items() if name == data}


def _tables(entries: Sequence[Entry]) -> list[tuple[str, list[tuple[str, list[float | None]]]]]:
    """Return (title, rows) of the overall scores and of each group; a row is a name and one value per model."""
    tables = []
    groups = dict.fromkeys(name for entry in entries for name in entry.scores.get("groups", {}))
    for title in ["", *groups]:
        found = [_scores_of_group(entry, title) for entry in entries]
        rows = []
        for key in _all_keys(found):
            rows.append((key, [scores.get(key) for scores in found]))
        if rows:
            tables.append((title, rows))
    return tables


def _scores_of_group(entry: Entry, title: str) -> Mapping[str, Any]:
    if not title:
        return entry.scores.get("overall", {})
    return entry.scores.get("groups", {}).get(title, {})


def _all_keys(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _duels(entries: Sequence[Entry]) -> list[Duel]:
    """Compare the first student with the teacher and every other student that has scores on the same questions."""
    students = [entry for entry in entries if entry.role == "student"]
    if not students:
        return []
    first = students[0]
    others = [entry for entry in entries if entry.role == "teacher"] + students[1:]
    return [duel(first, other, "score") for other in others if _scored(first).keys() & _scored(other).keys()]


def _scored(entry: Entry) -> dict[int, float]:
    """Return the score of each question by its index."""
    return {p.index: p.score for p in entry.predictions if p.score is not None}


def _gallery(entries: Sequence[Entry], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return questions on which the models score differently, in groups by who scores higher."""
    if not entries:
        return []
    scores = [_scored(entry) for entry in entries]
    common = sorted(set[int].intersection(*map(set, scores)))
    members: dict[str, list[int]] = {name: [] for name in _GROUPS}
    for index in common:
        group = _group(entries, [of_model[index] for of_model in scores])
        if group is not None:
            members[group].append(index)
    answers = [by_index(entry) for entry in entries]
    groups = []
    for name, indices in members.items():
        files = {index: find_picture(answers[0][index].image, folders) for index in indices}
        # Prefer questions whose picture can be shown.
        shown = [index for index in indices if files[index] is not None] or indices
        cards = []
        for index in evenly_spaced(shown, CARDS):
            card = [(entry, predictions[index]) for entry, predictions in zip(entries, answers, strict=True)]
            cards.append({"answers": card, "picture": files[index]})
        if cards:
            groups.append({"name": name, "count": len(indices), "of": len(common), "cards": cards})
    return groups


def _group(entries: Sequence[Entry], scores: Sequence[float]) -> str | None:
    """Return the gallery's group of a question, ``None`` where the models score the same. The best teacher counts."""
    teacher = [score for entry, score in zip(entries, scores, strict=True) if entry.role == "teacher"]
    students = [score for entry, score in zip(entries, scores, strict=True) if entry.role == "student"]
    if len(set(students)) > 1:
        return _STUDENTS_DIFFER
    if not teacher or not students or max(teacher) == students[0]:
        return None
    return _TEACHER_HIGHER if max(teacher) > students[0] else _STUDENT_HIGHER
