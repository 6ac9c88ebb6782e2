"""Fault injection: named points at which a test kills a rank, as a power cut would, or stops it by a signal."""

from __future__ import annotations

import os
import signal
from collections import Counter

#: ``name:count``, ``name:count:rank`` or ``name:count:rank:signal``: a process that reaches the point for the
#: ``count``-th time gets SIGKILL or that signal; without a rank, every process does.
VARIABLE = "VLM_DISTILL_FAULT"

_passed: Counter[str] = Counter()


def point(name: str) -> None:
    """Send this process a signal here, if :data:`VARIABLE` asks for it; nothing is flushed or cleaned up."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    _passed[name] += 1
    place, count, rank, number = [*wanted.split(":"), "", ""][:4]
    if (place, int(count)) == (name, _passed[name]) and rank in ("", os.environ.get("RANK", "0")):
        os.kill(os.getpid(), signal.Signals[number or "SIGKILL"])
