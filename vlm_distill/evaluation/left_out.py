"""Describe in one line which samples were left out, and why."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from data.batch import Problem
from data.errors import UserError


def commonest_reason(problems: Sequence[Problem]) -> str:
    """Return the reason that most of these have."""
    return Counter(problem.reason for problem in problems).most_common(1)[0][0]


def reasons(problems: Sequence[Problem]) -> str:
    """Return the reasons in one line, the commonest first, with an example of it."""
    counts = Counter(problem.reason for problem in problems).most_common()
    listed = ", ".join(f"{reason} ({count})" for reason, count in counts[:3])
    more = f" and {len(counts) - 3} more reasons" if len(counts) > 3 else ""
    example = next(problem for problem in problems if problem.reason == counts[0][0])
    detail = f": {example.detail}" if example.detail else ""
    return f"{listed}{more}, as in {example.source}, line {example.line}{detail}"


def main_reason(problems: Sequence[Problem]) -> str:
    """Return the commonest reason with its count and an example, without the source's name."""
    if not problems:
        return "there is none"
    reason = commonest_reason(problems)
    count = sum(problem.reason == reason for problem in problems)
    first = next(problem for problem in problems if problem.reason == reason)
    detail = f" (line {first.line}: {first.detail})" if first.detail else f" (the first in line {first.line})"
    return f"{count:,} × {reason}{detail}"


def too_much_left_out(
    name: str, answered: int, skipped: Sequence[Problem], limit: float, what: str = "questions"
) -> list[str]:
    """Return why scores cannot stand: nothing was asked, or more was left out than ``--max-bad`` allows.

    Args:
        name: of the data or benchmark.
        answered: number of questions with an answer.
        skipped: the questions left out; the same one may occur twice if several things were measured.
        limit: the share that may be left out.
        what: what the data are made of, in the plural.
    """
    left_out = len({(problem.source, problem.line) for problem in skipped})
    whole = answered + left_out
    if answered and left_out <= limit * whole:
        return []
    if not left_out:
        return [f"{name}: there are no {what}"]
    verdict = f"more than --max-bad {limit:g} allows" if answered else f"no {what} could be used"
    remedies = {"image not found": "name their folder with --images", "image outside the roots": "allow it with --root"}
    remedy = remedies.get(commonest_reason(skipped), "fix the data")
    return [f"{name}: {left_out:,} of {whole:,} {what} left out, {verdict}: {reasons(skipped)}; {remedy}"]


def report_failures(failures: Mapping[str, str]) -> None:
    """Print what could not be scored, one line each; raise the last line, so that the command exits with an error.

    Raises:
        UserError: if there are failures.
    """
    mistakes = [UserError(f"{name}: {reason}") for name, reason in failures.items()]
    for mistake in mistakes[:-1]:
        print(f"vlm-distill: {mistake}", file=sys.stderr)
    for mistake in mistakes[-1:]:
        raise mistake
