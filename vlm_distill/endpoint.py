"""Requests to an OpenAI-compatible server: tried again where that may help, and a person's mistakes in one line."""

from __future__ import annotations

import json
import os
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


class Endpoint:
    """A server's base address.

    Args:
        who: what it is to the person, to begin a message with: ``judge``.
        url: the base, as in ``http://localhost:8000/v1``.
        key: the environment variable that holds the key, if the server wants one.
        retries: tries after the first, on time-outs, lost connections and the server's own troubles.
        timeout: seconds for one request.
        wait: seconds before the first retry; each further one waits twice as long.
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
            UserError: the server refuses, or does not answer after all retries.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        for attempt in range(self.retries + 1):
            self.turn()
            wait = min(self.wait * 2**attempt, _LONGEST_WAIT)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return read(json.load(response))
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code} {error.reason}"
                if error.code not in _LATER:
                    detail = " ".join(error.read(300).decode("utf-8", "replace").split())
                    raise UserError(f"{self.who}: {self.url} refuses: {trouble}: {detail}") from None
                asked = error.headers.get("Retry-After", "")
                wait = min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else wait
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                # A lost connection, a time-out, or a reply that is not what the protocol says.
                trouble = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(wait)
        raise UserError(
            f"{self.who}: {self.url} did not answer in {self.retries + 1} tries, the last: {trouble}; {advice}"
        )
