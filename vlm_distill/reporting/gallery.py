"""Questions to look at: those that all models answered, in groups by who was right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlm_distill.evaluation.predictions import Prediction

from .entries import Entry

#: Largest number of questions shown of a group.
CARDS = 6
_GROUPS = (
    "Students differ",
    "Teacher right, student wrong",
    "Student right, teacher wrong",
    "All right",
    "All wrong",
)


def gallery(entries: Sequence[Entry], seen: Callable[[Prediction], bool] | None = None) -> list[dict[str, Any]]:
    """Return questions that all models answered, in groups by who was right, evenly spaced in each group.

    Args:
        entries: models with predictions.
        seen: returns whether a question's picture can be shown; such questions come first.
    """
    if not entries:
        return []
    answers = [by_index(entry) for entry in entries]
    common = sorted(set[int].intersection(*map(set, answers)))
    roles = [entry.role for entry in entries]
    members: dict[str, list[int]] = {name: [] for name in _GROUPS}
    for index in common:
        right = [predictions[index].exact > 0 for predictions in answers]
        members[_group(roles, right)].append(index)
    groups = []
    for name, indices in members.items():
        shown = indices
        if seen is not None:
            shown = [index for index in indices if seen(answers[0][index])] or indices
        cards = []
        for index in evenly_spaced(shown, CARDS):
            cards.append([(entry, predictions[index]) for entry, predictions in zip(entries, answers, strict=True)])
        if cards:
            groups.append({"name": name, "count": len(indices), "of": len(common), "cards": cards})
    return groups


def by_index(entry: Entry) -> dict[int, Prediction]:
    """Return a model's predictions by the index of the question."""
    return {prediction.index: prediction for prediction in entry.predictions}


def evenly_spaced(indices: Sequence[int], count: int) -> list[int]:
    """Return the middles of ``count`` equal stretches: deterministic, and seldom two questions about one picture."""
    count = min(count, len(indices))
    return [indices[(2 * k + 1) * len(indices) // (2 * count)] for k in range(count)]


def _group(roles: Sequence[str], right: Sequence[bool]) -> str:
    students = {r for role, r in zip(roles, right, strict=True) if role == "student"}
    if all(right):
        return "All right"
    if not any(right):
        return "All wrong"
    if len(students) == 2:
        return "Students differ"
    return "Student right, teacher wrong" if students == {True} else "Teacher right, student wrong"
