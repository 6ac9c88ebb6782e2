"""Print the progress of long work to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def progress_line(what: str, every: float = 10.0) -> Callable[[int, int], None]:
    """Return a function of (done, total) that prints both, at most once every ``every`` seconds.

    Work that finishes sooner prints nothing.
    """
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return show
