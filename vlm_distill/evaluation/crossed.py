"""Intervals of differences across seeds and questions: would other seeds and other questions show the same?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import UserError

from .compare import Metric, bootstrap_means
from .predictions import Prediction

#: Which question it is, and which picture it is about.
Key = tuple[str, int]


@dataclass(frozen=True)
class Crossed:
    """A difference of two settings over seeds and questions.

    Attributes:
        difference: a minus b.
        low, high: its 95 % interval.
        questions, pictures: numbers of questions, and of pictures that they are drawn by.
    """

    difference: float
    low: float
    high: float
    questions: int
    pictures: int


def compare_crossed(
    a: Mapping[int, Sequence[Prediction]],
    b: Mapping[int, Sequence[Prediction]],
    metric: Metric = "exact",
    resamples: int = 10_000,
) -> Crossed | None:
    """Compare two settings on the questions that all of their seeds answered.

    Args:
        a, b: predictions by seed. With two or more shared seeds, only these count, pair by pair.
        metric: the score of a question.
        resamples: of the bootstrap.

    Returns:
        ``None`` if a setting has fewer than two seeds.

    Raises:
        UserError: they have no question in common.
    """
    shared = sorted(a.keys() & b.keys())
    paired = len(shared) >= 2
    if paired:
        a, b = {seed: a[seed] for seed in shared}, {seed: b[seed] for seed in shared}
    if min(len(a), len(b)) < 2:
        return None
    tables = [[_scores(found, metric) for found in group.values()] for group in (a, b)]
    keys = sorted(set.intersection(*(set(scores) for table in tables for scores in table)))
    if not keys:
        raise UserError("nothing to compare: the runs have no question in common")
    pictures = {(p.source, p.index): p.image for found in a.values() for p in found}

    # Sum the scores of each picture's questions, which are not independent.
    numbers = {name: k for k, name in enumerate(dict.fromkeys(pictures[key] or key for key in keys))}
    cluster = np.array([numbers[pictures[key] or key] for key in keys])
    totals = []
    for table in tables:
        rows = [np.bincount(cluster, weights=[scores[key] for key in keys]) for scores in table]
        totals.append(np.stack(rows))
    parts = [totals[0] - totals[1]] if paired else [totals[0], -totals[1]]
    difference, low, high = crossed_interval(parts, np.bincount(cluster), resamples)
    return Crossed(difference, low, high, len(keys), len(numbers))


def _scores(predictions: Sequence[Prediction], metric: str) -> dict[Key, float]:
    found = {(p.source, p.index): getattr(p, metric) for p in predictions}
    return {key: float(score) for key, score in found.items() if score is not None}


def crossed_interval(
    parts: Sequence[np.ndarray], counts: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return a mean over seeds and questions and its 95 % interval, by a bootstrap of both.

    Questions are drawn with replacement, by picture. Seeds are too few to be drawn: of three, a bootstrap shows a third
    of the variance too little, and no tails. In their place, a draw of Student's t with the seeds' own deviation is
    added. What varies from one pair of seed and question to the next is in both; it is taken from the questions' part
    (variances of a crossed design, as in Searle, Casella & McCulloch 1992, chapter 4).

    Args:
        parts: sums of scores ``[seeds, pictures]``; the mean is the sum of the parts' means. One part of differences
            where seeds are paired, else one part for each setting, with its sign.
        counts: questions of each picture, ``[pictures]``.
        resamples: of the bootstrap.
        seed: of its random numbers.

    Returns:
        The mean, and the 2.5th and 97.5th percentile.
    """
    rng, questions = np.random.default_rng(seed), counts.sum()
    together = sum(part.mean(0) for part in parts)
    assert isinstance(together, np.ndarray)
    mean = float(together.sum() / questions)
    draws = bootstrap_means(together, counts, resamples, rng) - mean

    # What a picture adds to the mean of each seed: how it varies over seeds is counted with the seeds.
    own = sum(_interaction(part, counts) for part in parts)
    whole = float((((together - mean * counts) / questions) ** 2).sum())
    draws *= math.sqrt(max(0.0, whole - own) / whole) if whole else 0.0

    for part in parts:
        n = len(part)
        error = (part.sum(1) / questions).std(ddof=1) / math.sqrt(n)
        draws += error * rng.standard_t(n - 1, resamples)
    low, high = np.percentile(draws, [2.5, 97.5])
    return mean, mean + float(low), mean + float(high)


def _interaction(part: np.ndarray, counts: np.ndarray) -> float:
    """Return the variance that seed and picture together, beyond each alone, give to the mean over seeds."""
    questions = counts.sum()
    means = part.sum(1, keepdims=True) / questions
    influence = (part - means * counts) / questions
    return float(influence.var(0, ddof=1).sum() / len(part))
