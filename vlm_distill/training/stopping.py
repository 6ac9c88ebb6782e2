"""What a run does when it is told to stop: SIGTERM, as schedulers and launchers send it, or Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

from vlm_distill.launch import Failure, leave

from .watchdog import Watch

# Seconds. A terminal and a launcher may each pass on one Ctrl-C.
_ONCE_MORE = 1.0


class Stopping:
    """While it is open, SIGTERM and SIGINT are noted instead of ending the process.

    A second Ctrl-C ends it at once. A second SIGTERM changes nothing: launchers and schedulers repeat it, and have
    SIGKILL.

    Args:
        watch: of this rank; the first tells what happens.

    Attributes:
        asked: whether a signal has come to this rank. Others may not have got it: they must be told.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.asked = False
        self._since = 0.0
        self._nothing_to_lose = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside it a signal ends all ranks at once, with exit code 0: the checkpoint of this step is written."""
        self._nothing_to_lose = True
        if self.asked:
            self._leave()
        try:
            yield
        finally:
            self._nothing_to_lose = False

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and number == signal.SIGINT and now - self._since > _ONCE_MORE:
            leave(128 + number)
        if not self.asked:
            self.asked, self._since = True, now
            if self._nothing_to_lose:
                self._leave()
            if self.watch.rank == 0:
                again = "; once more ends it at once" if number == signal.SIGINT else ""
                told = f"told to stop: finishing this step and writing a checkpoint{again}"
                print(told, file=sys.stderr, flush=True)

    def _leave(self) -> NoReturn:
        # Others may not have got the signal, and would wait for this rank.
        self.watch.end(Failure("told to stop: the checkpoint is written; start the run again to go on", 0))
