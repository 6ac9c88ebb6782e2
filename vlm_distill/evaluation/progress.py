"""Show how far long work is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def progress_line(what: str, every: float = 10.0) -> Callable[[int, int], None]:
    """Return a function that takes (done, total) and prints them at most once in ``every`` seconds.

    Work that is done sooner prints nothing.
    """
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return show
