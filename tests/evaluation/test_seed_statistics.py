"""Intervals and tests over seeds: against SciPy's tests, by hand, and in simulated sweeps."""

import math

import numpy as np
import pytest
from scipy import stats

from vlm_distill.evaluation.seed_statistics import (
    compare_seeds,
    deviation_of,
    holm,
    seeds_needed,
    t_interval,
    t_quantile,
    verdicts,
)


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_quantiles_of_t_are_the_tables(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=6e-5)


def test_p_values_of_t_are_the_tables():
    """Two pairs whose differences are 1 and 3: t = 2 with one degree of freedom, p = 1 − 2 · atan(2) / π."""
    found = compare_seeds({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})
    assert found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi, abs=1e-12)
    assert found.half == pytest.approx(12.706205, abs=1e-5)


def test_an_interval_by_hand():
    mean, half = t_interval([0.70, 0.72, 0.71])
    assert mean == pytest.approx(0.71)
    assert half == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert t_interval([0.5]) == (0.5, None)
    assert deviation_of([0.70, 0.72, 0.71]) == pytest.approx(0.01)
    assert deviation_of([0.5]) is None


def test_shared_seeds_are_compared_in_pairs():
    rng = np.random.default_rng(0)
    a = dict(enumerate(rng.normal(0.8, 0.05, 6)))
    b = {seed: value - 0.02 + rng.normal(0, 0.01) for seed, value in a.items()}
    found = compare_seeds(a | {77: 0.0}, b | {99: 1.0})
    test = stats.ttest_rel(list(a.values()), list(b.values()))
    interval = test.confidence_interval()
    assert found.n == 6
    assert found.p == pytest.approx(test.pvalue, rel=1e-9)
    assert found.difference - found.half == pytest.approx(interval.low)
    assert found.difference + found.half == pytest.approx(interval.high)


def test_other_seeds_are_independent_samples():
    a, b = {0: 0.81, 1: 0.80, 2: 0.83, 3: 0.79}, {4: 0.70, 5: 0.78, 6: 0.66}
    found = compare_seeds(a, b)
    test = stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False)
    assert found.n == 0
    assert found.needed is None
    # Degrees of freedom are rounded down: the interval is a little wider than SciPy's.
    freedom = math.floor(test.df)
    assert found.p == pytest.approx(2 * stats.t.sf(test.statistic, freedom), rel=1e-9)
    assert found.p >= test.pvalue


def test_one_seed_has_a_difference_without_an_interval():
    found = compare_seeds({0: 0.9}, {0: 0.8, 1: 0.7})
    assert (found.difference, found.half, found.p) == (pytest.approx(0.15), None, None)
    with pytest.raises(ValueError, match="without a score"):
        compare_seeds({}, {0: 1.0})


@pytest.mark.parametrize(("b", "p"), [({0: 0.5, 1: 0.6}, 1.0), ({0: 0.4, 1: 0.5}, 0.0)])
def test_scores_without_any_spread(b, p):
    found = compare_seeds({0: 0.5, 1: 0.6}, b)
    assert found.p == pytest.approx(p, abs=1e-6)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_hold_the_true_difference_in_19_of_20_studies(seeds):
    """2,000 pairs of settings whose seeds share a part of their luck."""
    rng = np.random.default_rng(seeds)
    shared = rng.normal(0, 2, (2000, seeds))
    scores = [shared + rng.normal(mean, 1, (2000, seeds)) for mean in (0.7, 0.0)]
    held = 0
    for a, b in zip(*scores, strict=True):
        difference, half = t_interval((a - b).tolist())
        held += abs(difference - 0.7) <= half
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_as_many_seeds_as_needed_show_the_difference_in_four_of_five_studies():
    n = seeds_needed(1.0, 1.2)
    rng = np.random.default_rng(1)
    shown = {}
    for seeds in (n - 2, n):
        values = rng.normal(1.0, 1.2, (4000, seeds))
        shown[seeds] = (stats.ttest_1samp(values, 0, axis=1).pvalue < 0.05).mean()
    assert 0.78 < shown[n] < 0.87
    assert shown[n - 2] < shown[n]
    assert seeds_needed(1.0, 1.2, of=10) > n
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(0.001, 1.0) is None
    assert seeds_needed(5.0, 0.0) == 2


def test_seeds_that_did_not_show_a_difference_are_never_enough():
    """500 sweeps of a baseline and four settings, some of them better."""
    rng = np.random.default_rng(4)
    for _ in range(500):
        scores = rng.normal([[0], [0], [0.5], [1], [2]], 1, (5, 6))
        baseline, *others = ({seed: float(score) for seed, score in enumerate(row)} for row in scores)
        found = [compare_seeds(other, baseline, len(others)) for other in others]
        for comparison, verdict in zip(found, verdicts(found), strict=True):
            assert verdict != "no difference shown" or comparison.needed is None or comparison.needed > comparison.n


def test_holm_calls_a_null_effect_better_in_at_most_one_study_of_twenty():
    """2,000 sweeps of a baseline and five settings that are all equal, five seeds each."""
    rng = np.random.default_rng(2)
    scores = rng.normal(0, 1, (2000, 6, 5)) + rng.normal(0, 2, (2000, 1, 5))
    p_values = stats.ttest_rel(scores[:, 1:], scores[:, :1], axis=2).pvalue
    assert any(min(row) < 0.05 for row in p_values)
    wrong = sum(min(holm(row.tolist())) < 0.05 for row in p_values)
    assert wrong <= 0.05 * 2000
    # Without the correction, there are several times as many.
    assert (p_values.min(axis=1) < 0.05).mean() > 0.1
