"""Print benchmark scores and groups of seeds in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vlm_distill.evaluation.benchmark_scores import Result, average
from vlm_distill.evaluation.seed_groups import GroupScores, Pair
from vlm_distill.runtime.console import plain_console, print_whole

from . import plots


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


def print_groups(groups: Sequence[GroupScores], pairs: Sequence[Pair]) -> None:
    """Print the mean of each group of seeds, and all pairs of groups compared."""
    table = Table("", box=SIMPLE_HEAD)
    for heading in ("seeds", "mean ± sd, %"):
        table.add_column(heading, justify="right")
    for group in groups:
        deviation = None if group.deviation is None else 100 * group.deviation
        table.add_row(group.name, str(len(group.scores)), plots.spread(100 * group.mean, deviation))
    print_whole(table)
    if not pairs:
        print("these runs differ only by their seed; name runs with other settings to compare them with")
        return

    table = Table("", "against", box=SIMPLE_HEAD)
    for heading in ("points ± 95 %", "over questions too"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    table.add_column("needed", justify="right")
    for pair in pairs:
        half = None if pair.seeds.half is None else 100 * pair.seeds.half
        cells = [plots.spread(100 * pair.seeds.difference, half, sign="+"), _across_questions(pair)]
        table.add_row(pair.first, pair.second, *cells, pair.verdict, plots.needed(pair.seeds, pair.verdict))
    print_whole(table)
    print(
        "± 95 %: over seeds, paired where they are shared; beside it the interval over seeds and questions. The "
        "verdict is that over seeds, at 5 % after Holm's correction. needed: seeds that would show such a difference "
        "in four of five studies."
    )


def _across_questions(pair: Pair) -> str:
    if pair.crossed is None:
        return ""
    return f"{100 * pair.crossed.low:+.2f} to {100 * pair.crossed.high:+.2f}".replace("-", "−")


def main_score(result: Result) -> str:
    """Format the main score, with its maximum if that is not 100, and a mark if questions were limited."""
    if result.scores is None:
        return ""
    total = f" of {result.out_of:g}" if result.out_of != 100 else ""
    return f"{result.scores.main:.2f}{total}{' (limited)' if result.limited else ''}"
