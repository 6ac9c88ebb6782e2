"""Watchdog: which phase each rank is in, which rank the others wait for, and why a run ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from .launch import WAITED, Failure, leave

_INTERVAL = 1.0  # seconds between a rank's signs of life
_SILENT = 3  # intervals without one, after which a rank counts as stopped or gone
_WARNED = 0.2  # share of the limit; after twice as long a slow rank is reported
_PATIENCE = 3.0  # seconds that a rank waits for the one at fault to give its reason
# Words in errors that only say that another rank is gone.
_OF_OTHERS = ("gloo", "nccl", "processgroup", "connection closed", "connection reset", "broken pipe", "tcpstore")


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life: the sign's number, phases entered so far, the current phase and the seconds in it."""

    number: int
    phases: int
    phase: str
    seconds: float
    host: str
    process: int


class Watch:
    """Watches the ranks of a run, from a thread on each rank.

    The loop announces each :meth:`phase`, which costs nothing; the thread publishes it in the store through which the
    ranks found each other. All ranks go through the same phases in the same order, so the ranks waited for are those
    with the fewest phases. A rank that has spent ``limit`` in one phase, or waiting for the others, names them and
    ends. A rank that fails leaves its reason for the others, which end with it.

    Args:
        rank, world: this rank's number, and the number of ranks; a single rank is not watched.
        limit: in seconds.
    """

    def __init__(self, rank: int, world: int, limit: float) -> None:
        self.rank, self.world, self.limit = rank, world, limit
        self._host, self._process = socket.gethostname(), os.getpid()
        self._phases, self._phase, self._limited, self._since = 0, "starting", False, time.monotonic()
        self._ending, self._closed = threading.Lock(), threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}
        self._warned = -1
        self._store: dist.Store = dist.HashStore()
        if world > 1:
            # A separate connection: the process group's is busy while a rank is waited for.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
            self._store = dist.PrefixStore("vlm-distill/watch", store)
            self._interval = min(_INTERVAL, limit / 20)
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()

    def phase(self, name: str, *, limited: bool = True) -> None:
        """Announce this rank's next phase, and start counting its seconds.

        Args:
            name: for messages, to follow "has been in".
            limited: whether ``limit`` applies to it.
        """
        self._phases += 1
        self._phase, self._limited, self._since = name, limited, time.monotonic()

    @property
    def where(self) -> str:
        """This rank's phase."""
        return self._phase

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager around collective operations: inside it, ``limit`` applies in any phase."""
        limited = self._limited
        self._limited, self._since = True, time.monotonic()
        yield
        self._limited, self._since = limited, time.monotonic()

    def close(self) -> None:
        """Stop watching: this rank is done."""
        self._closed.set()

    def end(self, error: Failure, *, own: bool = True) -> NoReturn:
        """End this rank and thereby all others; one of them prints the reason.

        Args:
            error: the reason.
            own: true if this rank failed itself, false if it relays another rank's failure.
        """
        _do_not_stop()
        self._ending.acquire()  # never released: thread and loop may both get here, and the process ends
        reason = json.dumps({"rank": self.rank, "code": error.code, "message": str(error)})
        told = False
        try:
            found = json.loads(self._store.compare_set("reason", "", reason))
            if self.rank == 0:
                self._tell(found["message"], 0 if own and found["message"] == str(error) else found["rank"])
                self._store.set("told", "yes")
                told = True
                # The store lives on the first rank, which must leave last.
                self._await([f"left {rank}" for rank in range(1, self.world)])
            else:
                told = self._await(["told"])
                self._store.set(f"left {self.rank}", "yes")
        except (RuntimeError, ValueError):  # the first rank has ended, and the store with it
            found = json.loads(reason)
        if not told:
            self._tell(found["message"], found["rank"])
        leave(found["code"])

    def fail(self, error: Exception, failure: Failure | None) -> NoReturn:
        """End this rank because of an exception.

        Args:
            error: what was raised, perhaps only because another rank ended.
            failure: its one-line reason; ``None`` for a bug.
        """
        _do_not_stop()
        if failure is None and _of_others(error):
            # The other rank may still give its reason. If it does not, it was killed.
            self._wait_for_reason()
            lost = self._behind(silent_only=True)
            if lost:
                failure = Failure(f"{self._in_words(lost)}: it was killed or crashed. {_ENDED}", WAITED)
        if failure is None:
            if not self._has_reason():
                traceback.print_exception(error)
            failure = Failure(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)
        self.end(failure)

    def _tell(self, message: str, rank: int) -> None:
        where = "" if rank == 0 else f" [rank {rank}]"
        print(f"vlm-distill{where}: {message}", file=sys.stderr, flush=True)

    # The thread.

    def _watch(self) -> None:
        number = 0
        while not self._closed.wait(self._interval):
            number += 1
            try:
                self._give_sign(number)
                if self._has_reason():
                    self._follow()
                if self._limited and time.monotonic() - self._since > _WARNED * self.limit:
                    self._look()
            except RuntimeError:
                # The store lived on the first rank, which has ended; this rank may be about to end as well.
                if not self._closed.wait(_PATIENCE):
                    self.end(Failure(f"rank 0 has ended, while this one was in {self._phase}. {_ENDED}", WAITED))

    def _give_sign(self, number: int) -> None:
        seconds = time.monotonic() - self._since
        sign = Sign(number, self._phases, self._phase, seconds, self._host, self._process)
        self._store.set(f"rank {self.rank}", json.dumps(asdict(sign)))

    def _follow(self) -> None:
        """End with the reason that another rank has left."""
        found = json.loads(self._store.get("reason"))
        self.end(Failure(found["message"], found["code"]), own=False)

    def _look(self) -> None:
        """Name the ranks that are waited for: first in a warning, and at the limit as the reason to end."""
        behind = self._behind()
        seconds, phase = time.monotonic() - self._since, self._phase
        if not behind or (self.rank in behind and len(behind) < self.world):
            return  # the others say so
        if seconds > self.limit:
            self.end(Failure(f"{self._in_words(behind)}; the others wait for it. {_REMEDY}", WAITED))
        speaker = next((rank for rank in range(self.world) if rank not in behind), 0)
        # Twice as long, since silent ranks are recognised only after listening for a while.
        if self.rank == speaker and self._warned != self._phases and seconds > 2 * _WARNED * self.limit:
            self._warned = self._phases
            print(
                f"vlm-distill: warning: {self._in_words(behind)}; the others wait for it, here in {phase}",
                file=sys.stderr,
                flush=True,
            )

    def _signs(self) -> dict[int, Sign]:
        keys = {rank: f"rank {rank}" for rank in range(self.world)}
        return {
            rank: Sign(**json.loads(self._store.get(key))) for rank, key in keys.items() if self._store.check([key])
        }

    def _behind(self, *, silent_only: bool = False) -> dict[int, tuple[Sign, float]]:
        """Return the ranks that are waited for: the silent ones, or else those with the fewest phases.

        Returns:
            Their last signs, and for how many seconds each has been silent (0 if it is not).
        """
        try:
            signs, now = self._signs(), time.monotonic()
        except RuntimeError:
            return {}
        silent = {}
        for rank, sign in signs.items():
            number, since = self._heard.get(rank, (-1, now))
            if number != sign.number:
                since = now
            self._heard[rank] = (sign.number, since)
            if rank != self.rank and now - since > _SILENT * self._interval:
                silent[rank] = (sign, now - since)
        if silent or silent_only or not signs:
            return silent
        fewest = min(sign.phases for sign in signs.values())
        return {rank: (sign, 0.0) for rank, sign in signs.items() if sign.phases == fewest}

    def _in_words(self, ranks: dict[int, tuple[Sign, float]]) -> str:
        said = []
        for rank, (sign, silent) in list(ranks.items())[:4]:
            who = f"rank {rank} ({sign.host}, process {sign.process})"
            if silent:
                said.append(f"{who} has not been heard of for {silent:.0f} s, last in {sign.phase}")
            else:
                said.append(f"{who} has been in {sign.phase} for {sign.seconds:.0f} s")
        more = len(ranks) - len(said)
        return ", ".join(said) + (f", and {more} more ranks" if more else "")

    def _has_reason(self) -> bool:
        try:
            return bool(self._store.check(["reason"]))
        except RuntimeError:
            return False

    def _await(self, keys: list[str]) -> bool:
        """Wait a while for all of these keys. Return whether they have been set."""
        began = time.monotonic()
        while not (come := self._store.check(keys)) and time.monotonic() - began < _PATIENCE:
            time.sleep(0.05)
        return come

    def _wait_for_reason(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < (_SILENT + 2) * self._interval and not self._has_reason():
            self._behind(silent_only=True)
            time.sleep(self._interval / 4)


_ENDED = "All ranks end; the steps since the last checkpoint are lost. Start the command again to resume"
_REMEDY = (
    "All ranks end: look at that machine (its disk, network and GPU), and start the command again to resume; "
    "training.timeout is the limit in minutes"
)


def _do_not_stop() -> None:
    """Ignore SIGTERM: a launcher stops all ranks once one has ended, perhaps before the reason is printed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _of_others(error: Exception) -> bool:
    text = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in text for w in _OF_OTHERS))
