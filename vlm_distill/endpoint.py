"""Requests to an OpenAI-compatible server: retried where that may help, a person's mistakes reported in one line.

A server is not trusted: a request has one time limit for everything, a reply has a size limit, redirects are not
followed, and nothing that the server says shows the key.
"""

from __future__ import annotations

import base64
import html
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from data.errors import UserError
from vlm_distill.config.confidential import secret_in

T = TypeVar("T")

_LATER = (408, 409, 429, 500, 502, 503, 504)  # what may go well on another try
_LONGEST_WAIT = 60.0
# Of its own: the training's random numbers are not its to take.
_CHANCE = random.Random()
# What reading a reply may raise where it has another shape, hostile ones included: nested deeply, numbers out of range.
_NOT_AS_WANTED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
# Room for the log-probabilities of a long prompt; most replies have a few kilobytes.
_LARGEST_REPLY = 256 * 2**20
_LARGEST_REFUSAL = 2**16
_CHUNK = 2**16
# Of what a server says, as much goes into a message.
_SHOWN = 300
# A shorter key is a word such as EMPTY, which a reply may hold for other reasons.
_SHORTEST_KEY = 8


class Refused(UserError):
    """A server refused a request with an HTTP status, after all retries where they may help.

    Attributes:
        status: the HTTP status.
        detail: what the server says to it, in one line without the key.
    """

    def __init__(self, message: str, status: int, detail: str) -> None:
        super().__init__(message)
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class _Reply:
    """What came back: the status with its words, the headers, and the body, cut at the size limit."""

    status: int
    reason: str
    headers: http.client.HTTPMessage
    body: bytes
    whole: bool


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Leave a redirect as the refusal that it is: the address is the person's to change."""


_OPENER = urllib.request.build_opener(_NoRedirects)


class Endpoint:
    """A server's base address.

    Args:
        who: what it is to the person, to begin a message with: ``judge``.
        url: the base, as in ``http://localhost:8000/v1``.
        key: the environment variable that holds the key, if the server wants one.
        retries: tries after the first, on time-outs, lost connections and the server's own troubles.
        timeout: seconds for one request in total, from the connection to the reply's last byte.
        wait: seconds before the first retry, and up to half as many more; each further one waits twice as long.
        largest: bytes of a reply, at most.
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
        largest: int = _LARGEST_REPLY,
        turn: Callable[[], None] = lambda: None,
    ) -> None:
        _check_address(who, url, key)
        self.who, self.url, self.key = who, url.rstrip("/"), key
        self.retries, self.timeout, self.wait, self.largest, self.turn = retries, timeout, wait, largest, turn

    def ask(self, path: str, body: Any, read: Callable[[Any], T], advice: str = "start again when it does") -> T:
        """Return what ``read`` takes out of the reply.

        Args:
            path: below the base, as in ``chat/completions``.
            body: what is sent as JSON; ``None``: a GET without any.
            read: takes what is wanted out of the reply. Where it finds something else, it raises ``ValueError``,
                ``KeyError``, ``IndexError``, ``TypeError`` or ``AttributeError``, and the request is tried again.
            advice: what to do when all tries have failed.

        Raises:
            Refused: the server answers with an HTTP status that says no, after all retries where they may help.
            UserError: it does not answer after all retries, or not as ``read`` wants it, or its reply is too large.
        """
        key = self._secret()
        request = self._request(path, body, key)
        refused: tuple[int, str] | None = None
        for attempt in range(self.retries + 1):
            self.turn()
            wait = min(self.wait * 2**attempt, _LONGEST_WAIT)
            try:
                reply = _within(self.timeout, lambda: _exchange(request, self.timeout, self.largest))
                if reply.status < 300:
                    return read(self._content(reply, key))
                refused = reply.status, _told(reply, key)
                trouble = f"HTTP {reply.status} {_shown(reply.reason, key)}"
                if reply.status not in _LATER:
                    raise Refused(f"{self.who}: {self.url} refuses: {trouble}: {refused[1]}", *refused)
                asked = reply.headers.get("Retry-After", "")
                wait = min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException, *_NOT_AS_WANTED) as error:
                # A lost connection, a time-out, or a reply that is not what the protocol says.
                trouble, refused = _shown(f"{type(error).__name__}: {error}", key), None
            if attempt < self.retries:
                # Not all that were turned away come back at the same moment.
                time.sleep(wait * (1 + _CHANCE.random() / 2))
        tries = f"did not answer in {self.retries + 1} tries, the last: {trouble}"
        message = f"{self.who}: {self.url} {tries}; {advice}"
        raise UserError(message) if refused is None else Refused(message, *refused)

    def _request(self, path: str, body: Any, key: str | None) -> urllib.request.Request:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        return request

    def _content(self, reply: _Reply, key: str | None) -> Any:
        """Return a reply's JSON, with the key and halves of surrogate pairs, which no file can hold, replaced.

        Raises:
            UserError: it is larger than the limit.
            ValueError, RecursionError: it is no JSON.
        """
        if not reply.whole:
            raise UserError(
                f"{self.who}: {self.url} sends a reply of more than {self.largest:,} bytes, which is not read; "
                "check what serves this address"
            )
        text = reply.body.decode("utf-8", "replace")
        if key and len(key) >= _SHORTEST_KEY:
            text = _without_key(text, key)
        content = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            pairs = json.dumps(content, ensure_ascii=False).encode("utf-16", "surrogatepass")
            content = json.loads(pairs.decode("utf-16", "replace"))
        return content

    def _secret(self) -> str | None:
        """Return the key; raise ``UserError`` where no header can hold it, whose error would show it."""
        key = os.environ.get(self.key, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.key}: the key has characters that no HTTP header holds; set it again")
        return key or None


def _check_address(who: str, url: str, key: str) -> None:
    """Raise ``UserError`` for an address that cannot be asked. One that may hold a secret is not repeated."""
    if secret := secret_in(url):
        raise UserError(f"{who}: the address holds {secret}; a key is read from {key}")
    if any(mark in url for mark in "@?#"):
        raise UserError(
            f"{who}: the address must be a base such as http://localhost:8000/v1, without @, ? or #; "
            f"a key is read from {key}"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not (sound and url.isascii() and url.isprintable() and " " not in url):
        raise UserError(f"{who}: {url!r} is not an address; give one such as http://localhost:8000/v1")


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call gives; raise ``TimeoutError`` after so many seconds in total.

    A socket's own time-out starts again with every byte, so that a server which sends one now and then would never
    reach it. A call that runs out of time goes on in its thread, which no process waits for.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no whole reply in {seconds:g} s") from None


def _exchange(request: urllib.request.Request, seconds: float, largest: int) -> _Reply:
    """Send a request and read the reply, of either kind."""
    until = time.monotonic() + seconds
    try:
        response = _OPENER.open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        response, largest = error, _LARGEST_REFUSAL
    with response:
        body, whole = _read(response, until, largest)
        return _Reply(response.status, response.reason or "", response.headers, body, whole)


def _read(response: Any, until: float, largest: int) -> tuple[bytes, bool]:
    """Return the body up to a size, and whether that is all of it."""
    body = bytearray()
    while len(body) <= largest:
        if time.monotonic() > until:
            raise TimeoutError("the reply takes too long")
        chunk = response.read1(_CHUNK)
        if not chunk:
            if response.length:  # what Content-Length said and did not come
                raise http.client.IncompleteRead(b"", response.length)
            return bytes(body), True
        body += chunk
    return bytes(body[:largest]), False


def _told(reply: _Reply, key: str | None) -> str:
    """Return what a server says to a refusal, and where it redirects to."""
    text = _shown(reply.body.decode("utf-8", "replace"), key, cut=not reply.whole)
    if reply.status in range(300, 400) and (place := reply.headers.get("Location")):
        text = f"it redirects to {_shown(place, key)}; give that address if you trust it"
    return text


def _shown(text: str, key: str | None, *, cut: bool = False) -> str:
    """Return a server's words as one short line without the key.

    Args:
        cut: whether the text was cut somewhere, so that its end may be the beginning of the key.
    """
    if key:
        text = _without_key(text, key)
        text = text[: -len(key)] if cut else text
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _without_key(text: str, key: str) -> str:
    """Replace the key however a server may write it: in other case, escaped for URLs, HTML or JSON, in base64."""
    forms = {key, urllib.parse.quote(key, safe=""), html.escape(key), json.dumps(key)[1:-1]}
    forms |= {key.replace("/", "\\/"), base64.b64encode(key.encode()).decode().rstrip("=")}
    pattern = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    return re.sub(pattern, "…", text, flags=re.IGNORECASE)
