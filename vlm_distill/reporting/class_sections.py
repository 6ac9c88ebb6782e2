"""The report's sections on classifiers: measures, classes, seeds, calibration, and images on which models differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_distill.evaluation.pictures import find_picture
from vlm_distill.evaluation.predictions import Prediction

from . import class_plots, seeds
from .entries import Duel, Entry, Run, duel, entries_on
from .gallery import gallery

_ALL_CLASSES = 20
_EXTREMES = 5


def is_classification(scores: Mapping[str, Any]) -> bool:
    """Return whether a ``scores.json`` is about a classifier."""
    return scores.get("kind") == "classification"


def classification_sections(runs: Sequence[Run], baselines: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a section for each data set; ``baselines`` are shown in the first.

    Every run's scores are shown. Where runs differ only by their seed, one of them represents the others wherever
    single images are compared.
    """
    names: dict[str, None] = {}
    for run in runs:
        for (data, _), scores in run.scores.items():
            if is_classification(scores):
                names[data] = None
    return [_section(runs, data, {} if k else baselines) for k, data in enumerate(names)]


def _section(runs: Sequence[Run], data: str, baselines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    entries = entries_on(runs, data, baselines)
    scored = [run for run in runs if (data, "student") in run.scores]
    shown = seeds.one_of_each(entries, runs, data)
    answered = [entry for entry in shown if entry.predictions]
    return {
        "data": data,
        "entries": entries,
        "shown": shown,
        "compared": any("agreement" in e.scores for e in entries),
        "mce": any(e.scores.get("mce") is not None for e in entries),
        "skipped": _skipped(entries),
        "seeds": seeds.seed_board(runs, data),
        "duels": _duels([e for e in answered if e.role == "student"]),
        "classes": _classes([e for e in shown if e.scores.get("by_type")]),
        "corruptions": next((e for e in shown if e.role == "student" and e.scores.get("corruptions")), None),
        "reliability": class_plots.reliability([(e.label, e.css, e.scores.get("calibration", [])) for e in shown]),
        "confusion": _confusion(answered),
        "gallery": _gallery(answered, scored, data),
    }


def _skipped(entries: Sequence[Entry]) -> list[tuple[str, Mapping[str, int]]]:
    """Return which model left out how many images for which reasons, in one entry if all models agree."""
    found = [(e.label, e.scores["skipped"]) for e in entries if e.scores.get("skipped")]
    alike = len(found) > 1 and all(skipped == found[0][1] for _, skipped in found)
    if alike and len(found) == len(entries):
        return [("All models", found[0][1])]
    return found


def _duels(students: Sequence[Entry]) -> list[Duel]:
    """Compare the first student with each other one."""
    return [duel(students[0], other) for other in students[1:]]


def _classes(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return rows of a class, its number of images and one accuracy per model: all classes, or the best and worst."""
    if not entries:
        return {}
    names = list(dict.fromkeys(name for entry in entries for name in entry.scores["by_type"]))
    first = next((e for e in entries if e.role == "student"), entries[0])

    def row(name: str) -> tuple[str, int, list[float | None]]:
        found = [entry.scores["by_type"].get(name, {}) for entry in entries]
        return name, max(f.get("n", 0) for f in found), [f.get("exact") for f in found]

    if len(names) <= _ALL_CLASSES:
        return {"entries": entries, "parts": [("", [row(name) for name in names])]}
    scored = {name: f["exact"] for name, f in first.scores["by_type"].items() if f.get("exact") is not None}
    ranked = sorted(scored, key=lambda name: -scored[name])
    parts = []
    for which, some in (("best", ranked[:_EXTREMES]), ("worst", ranked[-_EXTREMES:])):
        parts.append((f"{first.label}: {which} of {len(names):,} classes", [row(name) for name in some]))
    return {"entries": entries, "parts": parts}


def _confusion(entries: Sequence[Entry]) -> list[tuple[Entry, Any]]:
    """Draw the confusions of the first student and of its teacher."""
    chosen = [e for e in entries if e.role == "student"][:1] + [e for e in entries if e.role == "teacher"]
    pictures = []
    for entry in chosen:
        names = list(entry.scores.get("by_type", {}))
        # An image with several right labels (ReaL) belongs to no single row.
        if 2 <= len(names) <= _ALL_CLASSES and all(len(p.references) == 1 for p in entry.predictions):
            pairs = [(p.references[0], p.answer) for p in entry.predictions]
            pictures.append((entry, class_plots.confusion(f"Answers of {entry.label}", entry.css, names, pairs)))
    return pictures


def _gallery(entries: Sequence[Entry], runs: Sequence[Run], data: str) -> list[dict[str, Any]]:
    folders = [run.evaluations_folder / data / "pictures" for run in runs]
    kept: set[str] = set()
    for folder in folders:
        if folder.is_dir():
            kept |= {f"sha256:{path.stem}" for path in folder.iterdir()}

    def seen(prediction: Prediction) -> bool:
        # Only images without a file of their own, named by their hash, need a kept copy.
        image = prediction.image
        return image is not None and (not image.startswith("sha256:") or image in kept)

    groups = gallery(entries, seen)
    for group in groups:
        cards = group["cards"]
        group["cards"] = [{"answers": card, "picture": find_picture(card[0][1].image, folders)} for card in cards]
    return groups
