"""The average by which the Open VLM Leaderboard ranks models."""

from __future__ import annotations

from collections.abc import Mapping

#: The eight benchmarks of the average, as the leaderboard names them.
SUITE = ("MMBench_V11", "MMStar", "MMMU_VAL", "MathVista", "OCRBench", "AI2D", "HallusionBench", "MMVet")

# Divide these scores to get 0…100, the scale of all others.
_DIVISORS = {"OCRBench": 10.0, "MME": 28.0}


def suite_average(scores: Mapping[str, float | None], benchmarks: tuple[str, ...] = SUITE) -> float | None:
    """Return the mean of the main scores, rounded to one decimal; ``None`` if one is missing.

    Args:
        scores: benchmark → ``Scores.main``: per cent, except OCRBench 0…1000 and MME 0…2800.
        benchmarks: the benchmarks to average; by default the leaderboard's eight.
    """
    found = [(name, scores.get(name)) for name in benchmarks]
    values = [value / _DIVISORS.get(name, 1.0) for name, value in found if value is not None]
    # An empty table scores NaN.
    if not values or len(values) < len(found) or any(value != value for value in values):
        return None
    return round(sum(values) / len(values), 1)
