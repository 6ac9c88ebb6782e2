"""Several servers of the same model as one: a request goes to the least busy, and around dead ones."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from .endpoint import LATER, Endpoint, Refused, Unreachable

T = TypeVar("T")

# Seconds after which a server that did not answer is tried again.
_REST = 30.0


@dataclass
class _State:
    """What is known of one server.

    Attributes:
        checks: each raises ``UserError`` if the server must not be used.
        busy: requests under way.
        rests_until: when it is tried again, by the monotonic clock; 0 while it answers.
    """

    checks: list[Callable[[], None]] = field(default_factory=list)
    busy: int = 0
    rests_until: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class EndpointPool:
    """Asks one of several servers, as :class:`~.endpoint.Endpoint` asks one.

    A server that cannot be reached is dropped with a warning, and its requests go to the others. After 30 seconds it is
    tried again, checked as at the start, and used again once it answers.

    Args:
        members: the servers. They are not retried one by one.
        retries: rounds through all servers after the first.
    """

    def __init__(self, members: Sequence[Endpoint], retries: int = 5) -> None:
        self.members, self.retries = [*members], retries
        for member in self.members:
            member.retries = 0
        self.who, self.wait = members[0].who, members[0].wait
        self.url = ", ".join(member.url for member in members)
        self._states = [_State() for _ in members]

    def above(self, suffix: str) -> EndpointPool:
        """Return the same servers at their addresses without this ending, if they have that."""
        other = EndpointPool([member.above(suffix) for member in self.members], self.retries)
        other._states = self._states
        return other

    @property
    def largest(self) -> int:
        """Largest size of a reply in bytes."""
        return self.members[0].largest

    @largest.setter
    def largest(self, size: int) -> None:
        for member in self.members:
            member.largest = size

    def check_each(self, check: Callable[[Endpoint], None]) -> None:
        """Check every server now, and a dropped one before it is used again.

        Raises:
            Unreachable: no server answers.
            UserError: ``check`` raises it.
        """
        for number, (state, member) in enumerate(zip(self._states, self.members, strict=True)):
            state.checks.append(partial(check, member))
            if state.rests_until:
                continue
            try:
                check(member)
            except Unreachable as unreachable:
                self._drop(number, unreachable)
                error = unreachable
        if all(state.rests_until for state in self._states):
            raise error

    def ask(self, path: str, body: Any, read: Callable[[Any], T], *settings: Any, **named: Any) -> T:
        """Send a request to a server that answers, and return what ``read`` extracts; as ``Endpoint.ask``."""
        for attempt in range(self.retries + 1):
            for number in self._in_turn():
                try:
                    return self._ask_one(number, lambda member: member.ask(path, body, read, *settings, **named))
                except Refused as refused:
                    if refused.status not in LATER:
                        raise
                    error: Refused | Unreachable = refused
                except Unreachable as unreachable:
                    self._drop(number, unreachable)
                    error = unreachable
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise error

    def _in_turn(self) -> list[int]:
        """Return the servers to try: the least busy first, dropped ones last."""
        now = time.monotonic()
        ready: list[int] = []
        resting: list[int] = []
        for number, state in enumerate(self._states):
            (resting if state.rests_until > now else ready).append(number)
        for number in ready:
            if self._states[number].rests_until:  # one request finds out whether it answers again
                self._states[number].rests_until = now + _REST
        return [*sorted(ready, key=lambda number: self._states[number].busy), *resting]

    def _ask_one(self, number: int, ask: Callable[[Endpoint], T]) -> T:
        """Ask one server, which is checked first if it was dropped."""
        state, member = self._states[number], self.members[number]
        dropped = state.rests_until > 0
        with _working(state):
            if dropped:
                for check in state.checks:
                    check()
            reply = ask(member)
        if dropped:
            state.rests_until = 0.0
            print(f"vlm-distill: {self.who}: {member.url} answers again", file=sys.stderr, flush=True)
        return reply

    def _drop(self, number: int, error: Unreachable) -> None:
        """Ask a server only after the others for a while."""
        state = self._states[number]
        with state.lock:
            answered, state.rests_until = not state.rests_until, time.monotonic() + _REST
        if answered:
            where = f"{self.who}: {self.members[number].url}"
            print(
                f"vlm-distill: {where} does not answer and is left out until it does: {error.detail}", file=sys.stderr
            )


@contextmanager
def _working(state: _State) -> Iterator[None]:
    """Count a request as under way."""
    with state.lock:
        state.busy += 1
    try:
        yield
    finally:
        with state.lock:
            state.busy -= 1


def open_endpoint(who: str, url: str | Sequence[str], key: str, *, timeout: float) -> Endpoint | EndpointPool:
    """Return the server at an address, or the servers at several, as one.

    Raises:
        UserError: ``url`` is not an address, or contains a secret.
    """
    if isinstance(url, str):
        return Endpoint(who, url, key, timeout=timeout)
    return EndpointPool([Endpoint(who, one, key, timeout=timeout) for one in url])
