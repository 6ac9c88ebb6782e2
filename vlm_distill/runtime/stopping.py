"""How a run stops on SIGTERM, which schedulers and launchers send, or on Ctrl-C; within a program on Ctrl-C alone."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

from .launch import Failure, leave
from .watchdog import Watch

# Seconds in which a repeated signal counts once: a terminal and a launcher may each pass on the same Ctrl-C.
_ONCE_MORE = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Context manager: inside it, SIGTERM and SIGINT are noted instead of ending the process.

    A second Ctrl-C ends the process at once. A second SIGTERM changes nothing: launchers and schedulers repeat it, and
    can use SIGKILL.

    Args:
        watch: this rank's; the first rank reports what happens.
        code: exit code of a stopped run; ``None``: 128 + the signal's number, as in shells.
        owns_process: whether the process exists for this run alone. If not, only SIGINT is noted, and where the process
            would end, ``KeyboardInterrupt`` is raised.

    Attributes:
        asked: the first signal that reached this rank, 0 before. Other ranks may not have got it.
    """

    def __init__(self, watch: Watch, code: int | None = None, *, owns_process: bool = True) -> None:
        self.watch, self.code, self.owns_process = watch, code, owns_process
        self.asked = 0
        self._since = 0.0
        self._nothing_to_lose = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            noted = _SIGNALS if self.owns_process else (signal.SIGINT,)
            self._before = {s: signal.signal(s, self._note) for s in noted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def counts(self) -> dict[str, float]:
        """Return counts that ranks add up to learn whether one of them received a signal to stop, and which."""
        return {number.name: float(self.asked == number) for number in _SIGNALS}

    def signal_of(self, totals: Mapping[str, float]) -> int:
        """Return the signal that some rank has got, from the sums of :meth:`counts`; 0: none."""
        return next((int(number) for number in _SIGNALS if totals[number.name]), 0)

    def exit_code(self, number: int) -> int:
        """Return the exit code of a run that a signal stopped."""
        return 128 + number if self.code is None else self.code

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context manager: inside it, a signal ends all ranks at once; the checkpoint of this step is written."""
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
            if not self.owns_process:
                raise KeyboardInterrupt
            leave(128 + number)
        if not self.asked:
            self.asked, self._since = number, now
            if self._nothing_to_lose:
                self._leave()
            if self.watch.rank == 0 and self.owns_process:
                again = "; once more ends it at once" if number == signal.SIGINT else ""
                told = f"stopping: finishing this step and writing a checkpoint{again}"
                print(told, file=sys.stderr, flush=True)

    def _leave(self) -> NoReturn:
        if not self.owns_process:
            raise KeyboardInterrupt
        # Other ranks may not have got the signal, and would wait for this one.
        said = "stopping: the checkpoint is written; start the run again to continue"
        self.watch.end(Failure(said, self.exit_code(self.asked)))
