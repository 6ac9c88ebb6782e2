"""Requests to an OpenAI-compatible server, with retries and one-line errors.

The server is not trusted: each request has one overall time limit, replies have a size limit, redirects are not
followed, and the key is removed from everything the server says.
"""

from __future__ import annotations

import base64
import copy
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

#: HTTP statuses after which another try may help.
LATER = (408, 409, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0
# A generator of its own, so that training's random numbers stay the same.
_CHANCE = random.Random()
# Errors from reading a reply of an unexpected shape, including hostile ones: deep nesting, numbers out of range.
_NOT_AS_WANTED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
# Enough for the log-probabilities of a long prompt; most replies have a few kilobytes.
_LARGEST_REPLY = 256 * 2**20
_LARGEST_REFUSAL = 2**16
_CHUNK = 2**16
# Characters of a server's text that go into a message.
_SHOWN = 300
# A shorter key is a placeholder such as EMPTY, which a reply may contain for other reasons.
_SHORTEST_KEY = 8


class Refused(UserError):
    """A server refused a request with an HTTP status, after retries where those may help.

    Attributes:
        status: the HTTP status.
        detail: the server's explanation, in one line without the key.
    """

    def __init__(self, message: str, status: int, detail: str) -> None:
        super().__init__(message)
        self.status, self.detail = status, detail


class Unreachable(UserError):
    """A server gave no valid reply, after all retries.

    Attributes:
        detail: what went wrong at the last try, in one line.
    """

    def __init__(self, message: str, detail: str) -> None:
        super().__init__(message)
        self.detail = detail


@dataclass(frozen=True)
class _Reply:
    """A reply: status, reason, headers, and the body up to the size limit (``whole``: all of it)."""

    status: int
    reason: str
    headers: http.client.HTTPMessage
    body: bytes
    whole: bool


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Treat redirects as refusals: only the user may change the address."""


_OPENER = urllib.request.build_opener(_NoRedirects)


class Endpoint:
    """A server at a base address.

    Args:
        who: what messages call the server, such as ``judge``.
        url: the base address, such as ``http://localhost:8000/v1``.
        key: the environment variable that holds the key, if the server needs one.
        retries: retries after timeouts, lost connections and server errors.
        timeout: seconds for a whole request, from connecting to the reply's last byte.
        wait: seconds before the first retry, plus up to half as much at random; doubled for each further retry.
        largest: largest size of a reply in bytes.
        turn: called before every try; may block to limit the rate.

    Raises:
        UserError: ``url`` is not an address, or contains a secret.
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

    def above(self, suffix: str) -> Endpoint:
        """Return the same server at its address without this ending, if it has that."""
        other = copy.copy(self)
        other.url = self.url.removesuffix(suffix)
        return other

    def without_retries(self) -> Endpoint:
        """Return the same server, asked once."""
        other = copy.copy(self)
        other.retries = 0
        return other

    def check_each(self, check: Callable[[Endpoint], None]) -> None:
        """Call ``check`` with this server, as :class:`~.endpoint_pool.EndpointPool` does with each of several."""
        check(self)

    def ask(
        self,
        path: str,
        body: Any,
        read: Callable[[Any], T],
        advice: str = "start again when it does",
        *,
        is_json: bool = True,
    ) -> T:
        """Send a request, and return what ``read`` extracts from the reply.

        Args:
            path: path below the base address, such as ``chat/completions``.
            body: content to send as JSON; ``None``: send a GET request.
            read: extracts the result from the reply. For a reply of another shape it raises ``ValueError``,
                ``KeyError``, ``IndexError``, ``TypeError`` or ``AttributeError``, and the request is tried again.
            advice: what to do when all tries have failed.
            is_json: whether the reply is JSON; otherwise ``read`` gets its text.

        Raises:
            Refused: the server answers with an HTTP error status, after retries where those may help.
            Unreachable: there is no valid reply after all retries.
            UserError: the reply is too large.
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
                    return read(self._content(reply, key, is_json=is_json))
                refused = reply.status, _told(reply, key)
                trouble = f"HTTP {reply.status} {_shown(reply.reason, key)}"
                if reply.status not in LATER:
                    raise Refused(f"{self.who}: {self.url} refuses: {trouble}: {refused[1]}", *refused)
                asked = reply.headers.get("Retry-After", "")
                wait = min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else wait
            except (OSError, http.client.HTTPException, *_NOT_AS_WANTED) as error:
                # A lost connection, a timeout, or a reply that breaks the protocol.
                trouble, refused = _shown(f"{type(error).__name__}: {error}", key), None
            if attempt < self.retries:
                # Random, so that clients refused together do not return together.
                time.sleep(wait * (1 + _CHANCE.random() / 2))
        tries = f"did not answer in {self.retries + 1} tries, the last" if self.retries else "did not answer"
        message = f"{self.who}: {self.url} {tries}: {trouble}; {advice}"
        raise Unreachable(message, trouble) if refused is None else Refused(message, *refused)

    def _request(self, path: str, body: Any, key: str | None) -> urllib.request.Request:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        return request

    def _content(self, reply: _Reply, key: str | None, *, is_json: bool) -> Any:
        """Return a reply's JSON or text; ``None`` for an empty one. The key is replaced, and so are lone surrogates,
        which no file can hold.

        Raises:
            UserError: the reply is larger than the limit.
            ValueError, RecursionError: it is not JSON.
        """
        if not reply.whole:
            raise UserError(
                f"{self.who}: {self.url} sent a reply of more than {self.largest:,} bytes, which was not read; "
                "check what serves this address"
            )
        text = reply.body.decode("utf-8", "replace")
        if not text:
            return None
        if key and len(key) >= _SHORTEST_KEY:
            text = _without_key(text, key)
        if not is_json:
            return text
        content = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            pairs = json.dumps(content, ensure_ascii=False).encode("utf-16", "surrogatepass")
            content = json.loads(pairs.decode("utf-16", "replace"))
        return content

    def _secret(self) -> str | None:
        """Return the key; raise ``UserError`` if no header can hold it (the library's own error would show it)."""
        key = os.environ.get(self.key, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.key}: the key has characters that HTTP headers cannot hold; set it again")
        return key or None


def _check_address(who: str, url: str, key: str) -> None:
    """Raise ``UserError`` for an unusable address. One that may hold a secret is not shown."""
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


def in_background(call: Callable[[], T]) -> Future[T]:
    """Start a call in a daemon thread, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return the result of a call; raise ``TimeoutError`` after this many seconds in total.

    A socket's own timeout restarts with every byte, so a server that sends one now and then would never reach it. A
    call that runs out of time continues in its daemon thread.
    """
    try:
        return in_background(call).result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no whole reply in {seconds:g} s") from None


def _exchange(request: urllib.request.Request, seconds: float, largest: int) -> _Reply:
    """Send a request and read the reply, whatever its status."""
    until = time.monotonic() + seconds
    try:
        response = _OPENER.open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        response, largest = error, _LARGEST_REFUSAL
    with response:
        body, whole = _read(response, until, largest)
        return _Reply(response.status, response.reason or "", response.headers, body, whole)


def _read(response: Any, until: float, largest: int) -> tuple[bytes, bool]:
    """Return the body up to a size limit, and whether it is complete."""
    body = bytearray()
    while len(body) <= largest:
        if time.monotonic() > until:
            raise TimeoutError("the reply takes too long")
        chunk = response.read1(_CHUNK)
        if not chunk:
            if response.length:  # less than Content-Length promised
                raise http.client.IncompleteRead(b"", response.length)
            return bytes(body), True
        body += chunk
    return bytes(body[:largest]), False


def _told(reply: _Reply, key: str | None) -> str:
    """Return the server's explanation of a refusal, or where it redirects to."""
    text = _shown(reply.body.decode("utf-8", "replace"), key, cut=not reply.whole)
    if reply.status in range(300, 400) and (place := reply.headers.get("Location")):
        text = f"it redirects to {_shown(place, key)}; give that address if you trust it"
    return text


def _shown(text: str, key: str | None, *, cut: bool = False) -> str:
    """Return a server's text as one short line without the key.

    Args:
        cut: whether the text was cut, so that it may end with a part of the key.
    """
    if key:
        text = _without_key(text, key)
        text = text[: -len(key)] if cut else text
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _without_key(text: str, key: str) -> str:
    """Replace the key in any form: in either case, escaped for URLs, HTML or JSON, or in base64."""
    forms = {key, urllib.parse.quote(key, safe=""), html.escape(key), json.dumps(key)[1:-1]}
    forms |= {key.replace("/", "\\/"), base64.b64encode(key.encode()).decode().rstrip("=")}
    pattern = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    return re.sub(pattern, "…", text, flags=re.IGNORECASE)
