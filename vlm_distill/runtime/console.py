"""Print to the terminal: text whose square brackets are not markup, and the progress of long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text unchanged; rich's markup would fail on a name such as ``run[/1]``."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_whole(table: Table) -> None:
    """Print a table of numbers, wider than the terminal if it must be: a wrapped line is better than a cut number."""
    console = plain_console()
    wanted = Measurement.get(console, console.options.update(width=10_000), table).maximum
    console.width = max(console.width, wanted)
    console.print(table)


def progress_line(what: str, every: float = 10.0) -> Callable[[int, int], None]:
    """Return a function of (done, total) that prints both to standard error, at most once every ``every`` seconds.

    Work that finishes sooner prints nothing.
    """
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return show
