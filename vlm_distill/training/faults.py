"""Named places at which a test kills a rank, as a power cut would."""

from __future__ import annotations

import os
import signal
from collections import Counter

#: ``name:count`` or ``name:count:rank``: the process dies when it comes to that point the ``count``-th time.
VARIABLE = "VLM_DISTILL_FAULT"

_passed: Counter[str] = Counter()


def point(name: str) -> None:
    """Kills this process here, if :data:`VARIABLE` asks for it; nothing is flushed or cleaned up."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    _passed[name] += 1
    place, count, *rank = wanted.split(":")
    if (place, int(count)) == (name, _passed[name]) and rank in ([], [os.environ.get("RANK", "0")]):
        os.kill(os.getpid(), signal.SIGKILL)
