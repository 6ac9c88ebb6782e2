"""Requests to an OpenAI-compatible server: tried again where that may help, and a person's mistakes in one line."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from data.errors import UserError

from .confidential import secret_in

T = TypeVar("T")

_LATER = (408, 409, 429, 500, 502, 503, 504)  # what may go well on another try
_LONGEST_WAIT = 60.0
# Of its own: the training's random numbers are not its to take.
_CHANCE = random.Random()
_NOT_AS_WANTED = (ValueError, KeyError, IndexError, TypeError)


class Refused(UserError):
    """A server answered a request with an HTTP status that says no, to the end.

    Attributes:
        status: the HTTP status.
        detail: what the server says to it.
    """

    def __init__(self, message: str, status: int, detail: str) -> None:
        super().__init__(message)
        self.status, self.detail = status, detail


class Endpoint:
    """A server's base address.

    Args:
        who: what it is to the person, to begin a message with: ``judge``.
        url: the base, as in ``http://localhost:8000/v1``.
        key: the environment variable that holds the key, if the server wants one.
        retries: tries after the first, on time-outs, lost connections and the server's own troubles.
        timeout: seconds for one request.
        wait: seconds before the first retry, and up to half as many more; each further one waits twice as long.
        turn: called before every try, to wait for a turn.

    Raises:
        UserError: ``url`` is no address, or holds a secret.
    """

    def __init__(
        self,
        who: str,
        url: str,
        key: str,
        *,
        retries: int = 5,
        timeout: float = 120.0,
        wait: float = 1.0,
        turn: Callable[[], None] = lambda: None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{who}: '{url}' is no address; give one such as http://localhost:8000/v1")
        if secret := secret_in(url):
            raise UserError(f"{who}: the address holds {secret}; a key is read from {key}")
        self.who, self.url, self.key = who, url.rstrip("/"), key
        self.retries, self.timeout, self.wait, self.turn = retries, timeout, wait, turn

    def ask(self, path: str, body: Any, read: Callable[[Any], T], advice: str = "start again when it does") -> T:
        """A reply's content.

        Args:
            path: below the base, as in ``chat/completions``.
            body: what is sent as JSON; ``None``: a GET without any.
            read: takes what is wanted out of the reply. Where it finds something else, it raises ``ValueError``,
                ``KeyError``, ``IndexError`` or ``TypeError``, and the request is tried again.
            advice: what to do when all tries have failed.

        Raises:
            Refused: the server answers with an HTTP status that says no, after all retries where they may help.
            UserError: it does not answer after all retries, or not as ``read`` wants it.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        if key := self._secret():
            # Not sent to where a server redirects to.
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        refused: tuple[int, str] | None = None
        for attempt in range(self.retries + 1):
            self.turn()
            wait = min(self.wait * 2**attempt, _LONGEST_WAIT)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return read(json.load(response))
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code} {error.reason}"
                refused = error.code, _told(error, key)
                if error.code not in _LATER:
                    raise Refused(f"{self.who}: {self.url} refuses: {trouble}: {refused[1]}", *refused) from None
                asked = error.headers.get("Retry-After", "")
                wait = min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException, *_NOT_AS_WANTED) as error:
                # A lost connection, a time-out, or a reply that is not what the protocol says.
                trouble, refused = f"{type(error).__name__}: {error}", None
            if attempt < self.retries:
                # Not all that were turned away come back at the same moment.
                time.sleep(wait * (1 + _CHANCE.random() / 2))
        tries = f"did not answer in {self.retries + 1} tries, the last: {trouble}"
        message = f"{self.who}: {self.url} {tries}; {advice}"
        raise UserError(message) if refused is None else Refused(message, *refused)

    def _secret(self) -> str | None:
        """The key; raises ``UserError`` where no header can hold it, whose error would show it."""
        key = os.environ.get(self.key, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.key}: the key has characters that no HTTP header holds; set it again")
        return key or None


def _told(error: urllib.error.HTTPError, key: str | None) -> str:
    """The beginning of what a server says to a refusal, in one line without the key."""
    try:
        text = " ".join(error.read(300).decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        return ""
    return text.replace(key, "…") if key else text
