"""Paired comparison on cases small enough to work out by hand."""

import random

import numpy as np
import pytest

from data.errors import UserError
from vlm_distill.evaluation.compare import mcnemar, paired
from vlm_distill.evaluation.predictions import Prediction


def answers(scores, images=None, question="q"):
    images = images or [None] * len(scores)
    return [
        Prediction(i, "s", i + 1, question, ["a"], "a", 1.0, float(s), float(s), None, image)
        for i, (s, image) in enumerate(zip(scores, images, strict=True))
    ]


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (5, 5, 1.0),  # twice the half with its middle term, cut at one
        (1, 0, 1.0),
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_questions_does_not_overflow():
    # Normal approximation with continuity correction: z = (400 - 1) / sqrt(20,000) = 2.821, p = 0.00478.
    assert mcnemar(10_200, 9_800) == pytest.approx(0.00478, abs=5e-5)


def test_means_difference_and_counts():
    c = paired(answers([1, 1, 1, 0]), answers([1, 0, 0, 1]))
    assert (c.n, c.clusters, c.only_a, c.only_b) == (4, 4, 2, 1)
    assert (c.mean_a, c.mean_b, c.difference) == (0.75, 0.5, 0.25)
    assert c.low < 0.25 < c.high
    assert c.p_mcnemar == 1.0


def test_interval_agrees_with_the_normal_one_for_many_questions():
    rng = random.Random(0)
    a = [rng.random() < 0.8 for _ in range(4000)]
    b = [x if rng.random() < 0.7 else rng.random() < 0.7 for x in a]
    d = np.array(a, float) - np.array(b, float)
    half = 1.96 * d.std() / len(d) ** 0.5
    c = paired(answers(a), answers(b))
    assert c.low == pytest.approx(d.mean() - half, abs=0.1 * half)
    assert c.high == pytest.approx(d.mean() + half, abs=0.1 * half)


def test_questions_of_one_picture_are_drawn_together():
    # Ten pictures with 20 questions each, on which the models differ by the same amount within a picture: the interval
    # must be that of 10 observations, sqrt(20) times as wide as that of 200.
    a, b, images = [], [], []
    for k in range(10):
        a += [1] * 20
        b += [k % 2] * 20
        images += [f"{k}.png"] * 20
    clustered, single = paired(answers(a, images), answers(b, images)), paired(answers(a), answers(b))
    assert (clustered.clusters, single.clusters) == (10, 200)
    assert (clustered.high - clustered.low) / (single.high - single.low) == pytest.approx(20**0.5, rel=0.15)


def test_the_bootstrap_weighs_pictures_by_their_questions():
    # One picture with one question won, one with three lost: a resample is ±1, or the mean over all four, -1/2.
    c = paired(answers([1, 0, 0, 0], ["x", "y", "y", "y"]), answers([0, 1, 1, 1], ["x", "y", "y", "y"]))
    assert c.difference == -0.5
    assert (c.low, c.high) == (-1.0, 1.0)


def test_soft_scores_and_repeatability():
    a, b = answers([0.3, 1.0, 0.6]), answers([0.6, 0.0, 0.6])
    first, again = paired(a, b, metric="soft"), paired(a, b, metric="soft")
    assert first == again
    assert first.difference == pytest.approx(0.7 / 3)
    assert (first.only_a, first.only_b) == (1, 1)


def test_only_common_questions_count():
    c = paired(answers([1, 0, 1])[1:], answers([0, 1]))
    assert c.n == 1
    assert c.difference == -1.0


def test_different_questions_are_refused():
    with pytest.raises(UserError, match="no question in common"):
        paired(answers([1])[:0], answers([1]))
    with pytest.raises(UserError, match="different questions"):
        paired(answers([1]), answers([1], question="other"))
