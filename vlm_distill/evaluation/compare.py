"""Compare models on the same questions: a paired interval and McNemar's test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
from scipy.special import bdtr

from data.errors import UserError

from .predictions import Prediction, read_predictions

Metric = Literal["exact", "soft", "score"]


@dataclass(frozen=True)
class Comparison:
    """Two models on the questions that both answered.

    Attributes:
        n, clusters: number of questions, and of pictures (a question without a picture is a cluster of its own).
        mean_a, mean_b, difference: mean scores, and a minus b.
        low, high: 95 % interval of the difference.
        only_a, only_b: questions on which a scores higher than b, and the reverse.
        p_mcnemar: two-sided p-value of the exact test, which takes questions as independent; the interval does not.
    """

    n: int
    clusters: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p_mcnemar: float


def paired(
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    metric: Metric = "exact",
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two models question by question.

    The interval is the 2.5th to 97.5th percentile of a cluster bootstrap (Efron 1979; clusters as in Davison & Hinkley
    1997, section 3.8): pictures are drawn with replacement, each with all its questions, because questions about one
    picture are not independent. The p-value is McNemar's exact test, a binomial test on the questions where the models
    differ (for scores between 0 and 1: the sign test on which model scores higher). Questions that a benchmark's rules
    leave out are not compared by ``score``.

    Raises:
        UserError: the two have no question in common, or have different questions in the same row.
    """
    ours = {(p.source, p.index): p for p in a}
    pairs = [(ours[p.source, p.index], p) for p in b if (p.source, p.index) in ours]
    pairs = [(x, y) for x, y in pairs if getattr(x, metric) is not None and getattr(y, metric) is not None]
    if not pairs:
        raise UserError("nothing to compare: the two sets of predictions have no question in common")
    for x, y in pairs:
        if x.question != y.question:
            raise UserError(f"{x.source}, row {x.index}: the two sets of predictions ask different questions there")

    scores = np.array([(getattr(x, metric), getattr(y, metric)) for x, y in pairs], dtype=np.float64)
    difference = scores[:, 0] - scores[:, 1]
    low, high, clusters = _bootstrap([x for x, _ in pairs], difference, resamples, seed)
    only_a, only_b = int((difference > 0).sum()), int((difference < 0).sum())
    mean_a, mean_b = scores.mean(0)
    return Comparison(
        n=len(pairs),
        clusters=clusters,
        mean_a=float(mean_a),
        mean_b=float(mean_b),
        difference=float(mean_a - mean_b),
        low=low,
        high=high,
        only_a=only_a,
        only_b=only_b,
        p_mcnemar=mcnemar(only_a, only_b),
    )


def mean_interval(
    predictions: Sequence[Prediction], metric: Metric = "exact", resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of a model's mean score, by the cluster bootstrap of :func:`paired`.

    Questions that a benchmark's rules leave out have no ``score``, and are left out here.

    Raises:
        ValueError: no question has such a score.
    """
    asked = [p for p in predictions if getattr(p, metric) is not None]
    if not asked:
        raise ValueError(f"no question has a {metric} score")
    values = np.array([getattr(p, metric) for p in asked], dtype=np.float64)
    low, high, _ = _bootstrap(asked, values, resamples, seed)
    return low, high


def _bootstrap(
    predictions: Sequence[Prediction], values: np.ndarray, resamples: int, seed: int
) -> tuple[float, float, int]:
    """Return the 95 % interval of the mean of ``values``, one a question, and the number of pictures (clusters)."""
    names = [p.image if p.image is not None else (p.source, p.index) for p in predictions]
    numbers = {name: k for k, name in enumerate(dict.fromkeys(names))}
    cluster = np.array([numbers[name] for name in names])
    totals = np.bincount(cluster, weights=values)
    means = bootstrap_means(totals, np.bincount(cluster), resamples, np.random.default_rng(seed))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high), len(numbers)


def compare_all(paths: Sequence[Path], metric: str | None = None) -> list[tuple[str, Comparison | float]]:
    """Compare each model with the first one; the first entry is that model's own mean score.

    Args:
        paths: ``predictions.jsonl``, or folders of evaluations or runs (:func:`find_predictions`); at least two.
        metric: ``exact``, ``soft`` or ``score``; by default ``score`` if every model has scores, else ``exact``.

    Raises:
        UserError: there are fewer than two, one has no predictions, or as in :func:`paired`.
    """
    if len(paths) < 2:
        raise UserError("compare: name two or more sets of predictions")
    found = [find_predictions(path) for path in paths]
    kind = choose_metric(metric, found)
    rows: list[tuple[str, Comparison | float]] = []
    for path, predictions in zip(paths[1:], found[1:], strict=True):
        result = paired(predictions, found[0], kind)
        if not rows:
            rows.append((str(paths[0]), result.mean_b))
        rows.append((str(path), result))
    return rows


def choose_metric(metric: str | None, found: Iterable[Sequence[Prediction]]) -> Metric:
    """Return the metric that was asked for; by default ``score`` if all models have scores, else ``exact``.

    Raises:
        UserError: there is no such metric.
    """
    if metric is None:
        return "score" if all(any(p.score is not None for p in answers) for answers in found) else "exact"
    if metric not in get_args(Metric):
        raise UserError(f"compare: no metric {metric!r}; there are exact, soft and score")
    return cast(Metric, metric)


def find_predictions(path: Path) -> list[Prediction]:
    """Return the predictions in a file, below an evaluation's folder, or of a run's student.

    Raises:
        UserError: there are none, or a question occurs twice.
    """
    if path.is_file():
        return read_predictions(path)
    run = path / "evaluation"
    files = sorted(run.glob("*/student/predictions.jsonl") if run.is_dir() else path.rglob("predictions.jsonl"))
    if not files:
        raise UserError(f"{path}: no predictions.jsonl there; evaluate first, or name another folder")
    predictions = [p for file in files for p in read_predictions(file)]
    if len({(p.source, p.index) for p in predictions}) < len(predictions):
        raise UserError(f"{path}: holds answers to one question twice; name the folder of one evaluation")
    return predictions


def bootstrap_means(totals: np.ndarray, counts: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return means ``[resamples]`` over clusters drawn with replacement.

    Clusters with the same total and count are interchangeable, and there are few such kinds. So the number of clusters
    of each kind is drawn (multinomial): the same distribution, in time that hardly depends on the number of questions.
    """
    kinds, numbers = np.unique(np.stack([totals.round(9), counts], axis=1), axis=0, return_counts=True)
    means = []
    for start in range(0, resamples, 1000):  # in parts, to bound memory
        drawn = rng.multinomial(len(totals), numbers / numbers.sum(), size=min(1000, resamples - start))
        means.append((drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1]))
    return np.concatenate(means)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return McNemar's two-sided exact p-value (1947): 2·P(X ≤ min), X ~ Binomial(only_a + only_b, ½), at most 1."""
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
