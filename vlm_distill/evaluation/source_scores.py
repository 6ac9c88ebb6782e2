"""Scores for any data source: exact match and VQA accuracy, overall and by question type, and ROUGE-L."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.batch import Problem

from .kept_answers import PREDICTIONS
from .predictions import Prediction, write_predictions
from .scoring.rouge import rouge_l


def summarise(
    predictions: Sequence[Prediction], skipped: Sequence[Problem] = (), questions: int | None = None
) -> dict[str, Any]:
    """Return the scores overall and by question type.

    Args:
        questions: number of questions in the source, if more than were asked.

    Returns:
        ``n``; the means ``exact`` and ``soft`` in 0…1 (``None`` if n is 0); ``interval`` (Wilson, 95 %, of ``exact``);
        ``by_type`` with the same four keys for each question type; ``skipped`` (reason to count); ``cut`` (answers
        without an end); and ``limited_from``, the number of questions, if a limit left some out.
    """
    by_kind: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        if prediction.question_type is not None:
            by_kind.setdefault(prediction.question_type, []).append(prediction)
    asked = len(predictions) + len(skipped)
    return {
        **_means(predictions),
        "by_type": {kind: _means(of_kind) for kind, of_kind in sorted(by_kind.items())},
        "skipped": dict(Counter(problem.reason for problem in skipped)),
        "cut": sum(not p.complete for p in predictions),
        **({} if questions is None or questions <= asked else {"limited_from": questions}),
    }


def _means(predictions: Sequence[Prediction]) -> dict[str, Any]:
    n = len(predictions)
    if n == 0:
        return {"n": 0, "exact": None, "soft": None, "interval": None}
    exact = math.fsum(p.exact for p in predictions) / n
    soft = math.fsum(p.soft for p in predictions) / n
    return {"n": n, "exact": exact, "soft": soft, "interval": list(wilson_interval(exact, n))}


def answer_measures(
    predictions: Sequence[Prediction], skipped: Sequence[Problem], questions: int, measures: Sequence[str]
) -> dict[str, Any]:
    """Return those of ``measures`` that answers give, with ``n`` and what limits them.

    Args:
        predictions: answers to a source's questions.
        skipped: questions left out.
        questions: number of questions in the source.
        measures: wanted; ``exact`` also gives ``soft``.
    """
    scores = summarise(predictions, skipped, questions)
    values: dict[str, Any] = {key: scores[key] for key in ("n", "cut", "limited_from") if key in scores}
    if "exact" in measures:
        values |= {"exact": scores["exact"], "soft": scores["soft"]}
    if "rouge_l" in measures and predictions:
        values["rouge_l"] = mean_rouge_l(predictions)
    return values


def mean_rouge_l(predictions: Sequence[Prediction]) -> float | None:
    """Return the mean over answers, 0…1; ``None`` without answers."""
    if not predictions:
        return None
    return math.fsum(rouge_l(p.answer, p.references) for p in predictions) / len(predictions)


def wilson_interval(mean: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927), taking observations as independent."""
    if n == 0:
        return 0.0, 1.0
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - half) / scale, (centre + half) / scale


def in_words(scores: Mapping[str, Any]) -> str:
    """Return the overall scores of :func:`summarise` in words."""
    if not scores["n"]:
        return "no question could be read"
    words = f"exact match {scores['exact']:.2%}, VQA accuracy {scores['soft']:.2%} on {scores['n']:,} questions"
    return words + "".join(f", {note}" for note in notes_on(scores))


def notes_on(scores: Mapping[str, Any]) -> list[str]:
    """Return remarks on scores: whether a limit left questions out, and how many answers were cut."""
    notes = []
    if scores.get("limited_from"):
        notes.append(f"limited: of {scores['limited_from']:,} questions")
    if scores.get("cut"):
        longer = "--max-new-tokens or evaluation.max_new_tokens allows longer ones"
        notes.append(f"{scores['cut']:,} answers cut before their end ({longer})")
    return notes


def write_answers(
    folder: Path,
    predictions: Sequence[Prediction],
    skipped: Sequence[Problem] = (),
    questions: int | None = None,
) -> None:
    """Write ``predictions.jsonl`` (one :class:`Prediction` a line) and ``scores.json`` (:func:`summarise`)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / PREDICTIONS, predictions)
    scores = json.dumps(summarise(predictions, skipped, questions), indent=2, ensure_ascii=False)
    (folder / "scores.json").write_text(scores + "\n", "utf-8")
