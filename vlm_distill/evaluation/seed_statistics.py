"""Statistics over runs that differ by their seed: t intervals, comparisons paired by seed, Holm's correction."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

#: A difference whose adjusted p-value is below this is shown.
LEVEL = 0.05
#: Seeds beyond which a difference is not worth showing.
MOST_SEEDS = 1000
#: Probability with which as many seeds as :func:`seeds_needed` says show a true difference of that size.
POWER = 0.8


@dataclass(frozen=True)
class SeedComparison:
    """The difference of two settings' scores over seeds, a minus b.

    Attributes:
        n: shared seeds; 0 if they share fewer than two and are compared as independent samples.
        difference: of the means; over shared seeds if there are.
        half: half of the 95 % interval; ``None`` with too few seeds.
        p: two-sided p-value of "no difference"; ``None`` with too few seeds.
        needed: seeds that would show a true difference of this size after Holm's correction; ``None``: unknown, or more
            than 1,000.
    """

    n: int
    difference: float
    half: float | None
    p: float | None
    needed: int | None


def compare_seeds(a: Mapping[int, float], b: Mapping[int, float], of: int = 1) -> SeedComparison:
    """Compare two settings by their scores by seed.

    With two or more shared seeds, these are compared pair by pair (Student's paired t-test): runs of one seed share
    first weights and order of samples, so that their differences vary less than their scores. Otherwise all runs are
    independent samples (Welch 1947, with degrees of freedom rounded down).

    Args:
        a, b: scores by seed.
        of: how many comparisons are shown together; only ``needed`` depends on it.

    Raises:
        ValueError: a setting has no score.
    """
    if not a or not b:
        raise ValueError("a setting without a score cannot be compared")
    shared = sorted(a.keys() & b.keys())
    if len(shared) >= 2:
        differences = [a[seed] - b[seed] for seed in shared]
        mean, error, freedom = _mean(differences), _standard_error(differences), len(shared) - 1
        needed = seeds_needed(mean, error * math.sqrt(len(shared)), of)
        return _comparison(len(shared), mean, error, freedom, needed)
    difference = _mean(list(a.values())) - _mean(list(b.values()))
    if len(a) < 2 or len(b) < 2:
        return SeedComparison(0, difference, None, None, None)
    errors = [_standard_error(list(scores.values())) for scores in (a, b)]
    error = math.hypot(*errors)
    return _comparison(0, difference, error, _welch_freedom(errors, (len(a), len(b))), None)


def _comparison(n: int, difference: float, error: float, freedom: int, needed: int | None) -> SeedComparison:
    return SeedComparison(n, difference, t_quantile(freedom) * error, _p_value(difference, error, freedom), needed)


def _p_value(difference: float, error: float, freedom: int) -> float:
    """Return the two-sided p-value of Student's t test."""
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stdtr(freedom, -abs(difference) / error))


def _welch_freedom(errors: Sequence[float], counts: Sequence[int]) -> int:
    """Return Welch's degrees of freedom of a difference of means, rounded down, at least 1."""
    parts = math.fsum(error**4 / (count - 1) for error, count in zip(errors, counts, strict=True))
    if parts == 0:
        return sum(counts) - 2
    return max(1, math.floor(math.hypot(*errors) ** 4 / parts))


def seeds_needed(difference: float, deviation: float, of: int = 1) -> int | None:
    """Return how many pairs of seeds show a true difference with probability 0.8, at a level of 5 %.

    The smallest n with ``t₁₋ₐ(n − 1) + t₀.₈(n − 1) ≤ |difference| · √n / deviation``, where ``a = 0.025 / of``: the
    strictest level of Holm's correction, so that seeds which did not show a difference are never enough.

    Args:
        difference: the true mean difference.
        deviation: standard deviation of the differences of single pairs.
        of: how many comparisons are shown together.

    Returns:
        At least 2; ``None`` above 1,000.
    """

    def enough(n: int) -> bool:
        wanted = t_quantile(n - 1, 1 - LEVEL / of) + t_quantile(n - 1, 2 * POWER - 1)
        return wanted * deviation <= abs(difference) * math.sqrt(n)

    if difference == 0 or not enough(MOST_SEEDS):
        return None
    return bisect_left(range(MOST_SEEDS), True, lo=2, key=enough)


def verdicts(comparisons: Sequence[SeedComparison], *, lower: bool = False) -> list[str]:
    """Return what each comparison shows of its first setting, with Holm's correction over all of them.

    Args:
        comparisons: all that are shown together.
        lower: whether lower scores are better.

    Returns:
        ``better``, ``worse``, ``no difference shown`` or ``too few seeds`` for each.
    """
    tested = [(k, found.p) for k, found in enumerate(comparisons) if found.p is not None]
    adjusted = holm([p for _, p in tested])
    said = ["too few seeds"] * len(comparisons)
    for (k, _), p in zip(tested, adjusted, strict=True):
        said[k] = "no difference shown"
        if p < LEVEL:
            said[k] = "better" if (comparisons[k].difference < 0) == lower else "worse"
    return said


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the same order.

    Of those below 0.05, the probability that even one is a chance finding is at most 5 %.
    """
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted


def deviation_of(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; ``None`` for one value."""
    return None if len(values) < 2 else _standard_error(values) * math.sqrt(len(values))


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half its 95 % interval ``t₀.₉₇₅(n − 1) · s / √n`` (Student 1908); ``None`` for one value."""
    mean = _mean(values)
    if len(values) < 2:
        return mean, None
    return mean, t_quantile(len(values) - 1) * _standard_error(values)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    n, mean = len(values), _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def t_quantile(freedom: int, inside: float = 0.95) -> float:
    """Return the ``t`` with ``P(|T| ≤ t) = inside`` of Student's distribution."""
    return float(stdtrit(freedom, (1 + inside) / 2))
