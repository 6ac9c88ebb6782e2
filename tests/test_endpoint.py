"""Requests to a server: what is tried again, what a person is told, and what a hostile server cannot do."""

import base64
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.errors import UserError
from vlm_distill.endpoint import Endpoint, Refused

KEY = "OPENAI_API_KEY"


@contextmanager
def answering(*replies):
    """A server that answers with one ``(status, headers, body[, reason])`` after the other; the headers that it got."""
    left, got = list(replies), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            got.append(dict(self.headers))
            status, headers, body, *reason = left.pop(0)
            self.send_response(status, *reason)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        server.server_close()


def asked(url, retries=0):
    return Endpoint("teacher.server", url, KEY, wait=0.001, retries=retries).ask("models", None, lambda r: r["x"])


def test_what_breaks_off_or_makes_no_sense_is_asked_again():
    good = json.dumps({"x": 1}).encode()
    # Cut short; no JSON; something else; later.
    troubles = [(200, {"Content-Length": "99"}, b"{"), (200, {}, b"<html>"), (200, {}, b"[]"), (503, {}, b"")]
    with answering(*troubles, (429, {"Retry-After": "0"}, b""), (200, {}, good)) as (url, got):
        assert asked(url, retries=5) == 1
    assert len(got) == 6


def test_not_all_come_back_at_the_same_moment(monkeypatch):
    waits = []
    monkeypatch.setattr("vlm_distill.endpoint.time.sleep", waits.append)
    with answering(*[(503, {}, b"")] * 3, (429, {"Retry-After": "7"}, b""), (200, {}, b'{"x": 1}')) as (url, _):
        assert asked(url, retries=4) == 1
    for wait, least in zip(waits, (0.001, 0.002, 0.004, 7), strict=True):
        assert least < wait < 1.5 * least


def test_refusals_have_their_status_and_words():
    with answering((400, {}, b"too\n long"), *[(500, {}, b"broken")] * 2) as (url, _):
        with pytest.raises(Refused, match=r"teacher.server: http.* refuses: HTTP 400 Bad Request: too long") as refused:
            asked(url, retries=5)
        assert (refused.value.status, refused.value.detail) == (400, "too long")
        with pytest.raises(Refused, match="did not answer in 2 tries, the last: HTTP 500") as refused:
            asked(url, retries=1)
        assert (refused.value.status, refused.value.detail) == (500, "broken")


def test_a_redirect_is_reported_and_not_followed():
    with answering() as (other, there):
        moved = (302, {"Location": f"{other}/v1/models"}, b"")
        with answering(moved) as (url, _), pytest.raises(Refused, match="HTTP 302 Found: it redirects to http"):
            asked(url)
    assert not there


@pytest.mark.parametrize(
    "reply",
    [
        (401, {}, b"no such key: sesame-1/x"),
        (401, {}, b"no such key: SESAME-1/X, sesame-1%2Fx, sesame-1\\/x"),
        (401, {}, b" " * (2**16 - 4) + b"sesame-1/x"),  # cut within the key
        (401, {}, b"x " + base64.b64encode(b"sesame-1/x")),
        (401, {}, b"", "sesame-1/x is no key"),
        (302, {"Location": "http://127.0.0.1:9/?key=sesame-1/x"}, b""),
        (200, {}, b'{"y": "sesame-1/x"}'),
        (200, {}, b'{"sesame-1/x": sesame-1/x}'),
    ],
)
def test_no_message_repeats_the_key(monkeypatch, reply):
    monkeypatch.setenv(KEY, "sesame-1/x\r\n")
    with answering(reply) as (url, got), pytest.raises(UserError) as refused:
        asked(url)
    assert got[0]["Authorization"] == "Bearer sesame-1/x"
    for part in ("sesame", "SESAME", base64.b64encode(b"sesame-1").decode()[:8]):
        assert part not in str(refused.value)


def test_no_reply_holds_the_key_and_no_message_a_key_that_cannot_be_sent(monkeypatch):
    monkeypatch.setenv(KEY, "sesame-1")
    with answering((200, {}, b'{"x": "your key is sesame-1"}')) as (url, _):
        assert asked(url) == "your key is …"
    monkeypatch.setenv(KEY, "ses\name")
    with pytest.raises(UserError, match=KEY) as refused:
        asked("http://127.0.0.1:9")
    assert "ses" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:w0rd@127.0.0.1/v1",
        "me:w0rd@127.0.0.1/v1",
        "HTTP://me:w0/rd@127.0.0.1/v1",
        "http://127.0.0.1/v1?api_key=w0rd",
        "ftp://127.0.0.1/v1",
        "http://127.0.0.1:99999999/v1",
        "http://[127/v1",
        "http:///v1",
        "http://127.0.0.1/v 1",
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_without_its_secrets(url):
    with pytest.raises(UserError, match=r"^judge: ") as refused:
        Endpoint("judge", url, KEY)
    assert "w0" not in str(refused.value)


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b'{"x": ' * 200_000, b"null", b"[]", b'"x"', b"1" * 5000, b'{"y": 1}', b"\xff\xfe", b""]
)
def test_a_reply_of_another_shape_is_one_line(body):
    with answering((200, {}, body)) as (url, _), pytest.raises(UserError, match="did not answer: "):
        asked(url)


def test_halves_of_surrogate_pairs_are_replaced():
    with answering((200, {}, b'{"x": "a\\ud83d b \\ud83d\\ude00"}')) as (url, _):
        assert asked(url) == "a\ufffd b \U0001f600"


def test_a_reply_has_a_largest_size():
    endless = (200, {}, b'{"x": "' + b"y" * 5000 + b'"}')
    with answering(endless) as (url, got), pytest.raises(UserError, match="more than 1,000 bytes"):
        Endpoint("judge", url, KEY, largest=1000).ask("models", None, lambda r: r["x"])
    assert len(got) == 1


@pytest.mark.parametrize("slow", [b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b""])
def test_a_byte_now_and_then_does_not_hold_a_request(slow):
    server = socket.create_server(("127.0.0.1", 0))

    def drip():
        with suppress(OSError):
            connection, _ = server.accept()
            connection.sendall(slow)
            for _ in range(200):
                connection.sendall(b"x")
                time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    began = time.monotonic()
    with server, pytest.raises(UserError, match="TimeoutError"):
        Endpoint("judge", f"http://127.0.0.1:{server.getsockname()[1]}", KEY, retries=0, timeout=0.3).ask(
            "models", None, lambda r: r
        )
    assert time.monotonic() - began < 3
