"""Print benchmark scores in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from vlm_distill.evaluation.benchmark_scores import Result, average
from vlm_distill.runtime.console import plain_console


def print_results(results: Sequence[Result]) -> None:
    """Print a table of results, and the leaderboard's average where there is one."""
    table = Table("benchmark", "rules", "n", "cut", "metric", "score")
    for result in results:
        numbers = [f"{result.n:,}", f"{result.cut:,}"]
        table.add_row(result.benchmark, result.rules, *numbers, result.metric, main_score(result))
    plain_console().print(table)
    for result in results:
        if notes := result.notes():
            print(f"{result.benchmark}: {'; '.join(notes)}")
    if any(result.cut for result in results):
        print("cut: answers that reached the token limit; raise --max-new-tokens")
    mean = average(results)
    if mean is not None:
        print(f"average of the eight benchmarks of the Open VLM Leaderboard: {mean}")


def main_score(result: Result) -> str:
    """Format the main score, with its maximum if that is not 100, and a mark if questions were limited."""
    if result.scores is None:
        return ""
    total = f" of {result.out_of:g}" if result.out_of != 100 else ""
    return f"{result.scores.main:.2f}{total}{' (limited)' if result.limited else ''}"
