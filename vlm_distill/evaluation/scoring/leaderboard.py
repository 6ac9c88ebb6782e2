"""The average over benchmarks by which VLMs are ranked on the Open VLM Leaderboard."""

from __future__ import annotations

from collections.abc import Mapping

#: The eight benchmarks of the average, as the leaderboard names them.
SUITE = ("MMBench_V11", "MMStar", "MMMU_VAL", "MathVista", "OCRBench", "AI2D", "HallusionBench", "MMVet")

# What brings a score to 0…100; the others have it already.
_DIVISORS = {"OCRBench": 10.0, "MME": 28.0}


def suite_average(scores: Mapping[str, float | None], benchmarks: tuple[str, ...] = SUITE) -> float | None:
    """The mean of the main scores, rounded to one decimal, or ``None`` if one is missing.

    Args:
        scores: benchmark → ``Scores.main``: per cent, but OCRBench 0…1000 and MME 0…2800.
        benchmarks: whose average; the leaderboard's default eight.
    """
    found = [(name, scores.get(name)) for name in benchmarks]
    values = [value / _DIVISORS.get(name, 1.0) for name, value in found if value is not None]
    # NaN is what an empty table scores.
    if not values or len(values) < len(found) or any(value != value for value in values):
        return None
    return round(sum(values) / len(values), 1)
