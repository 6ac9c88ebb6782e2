"""Questions for people to look at: those that all models answered, in groups by who was right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlm_distill.evaluation.predictions import Prediction

from .entries import Entry

_CARDS = 6


def gallery(entries: Sequence[Entry], seen: Callable[[Prediction], bool] | None = None) -> list[dict[str, Any]]:
    """Questions that all models answered, in groups by who was right, evenly spaced in each group.

    Args:
        seen: whether there is a picture of a question; those come first.
    """
    if not entries:
        return []
    answers = [{p.index: p for p in entry.predictions} for entry in entries]
    common = sorted(set[int].intersection(*map(set, answers)))
    roles = [entry.role for entry in entries]
    groups: dict[str, list[int]] = {}
    for index in common:
        right = [by_index[index].exact > 0 for by_index in answers]
        groups.setdefault(_group(roles, right), []).append(index)
    order = [
        "Students differ",
        "Teacher right, student wrong",
        "Student right, teacher wrong",
        "All right",
        "All wrong",
    ]
    result = []
    for name in order:
        found = groups.get(name, [])
        rows = [i for i in found if seen(answers[0][i])] or found if seen is not None else found
        count = min(_CARDS, len(rows))
        # The middle of each of `count` equal stretches: deterministic, and seldom twice the same picture.
        chosen = [rows[(2 * k + 1) * len(rows) // (2 * count)] for k in range(count)]
        cards = [[(e, by_index[i]) for e, by_index in zip(entries, answers, strict=True)] for i in chosen]
        if cards:
            result.append({"name": name, "count": len(found), "of": len(common), "cards": cards})
    return result


def _group(roles: list[str], right: list[bool]) -> str:
    students = {r for role, r in zip(roles, right, strict=True) if role == "student"}
    if all(right):
        return "All right"
    if not any(right):
        return "All wrong"
    if len(students) == 2:
        return "Students differ"
    return "Student right, teacher wrong" if students == {True} else "Teacher right, student wrong"
