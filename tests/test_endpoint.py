"""Requests to a server: what is tried again, what a person is told, and that a key goes nowhere else."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.errors import UserError
from vlm_distill.endpoint import Endpoint, Refused

KEY = "OPENAI_API_KEY"


@contextmanager
def answering(*replies):
    """A server that answers with one of ``(status, headers, body)`` after the other, and the headers that it got."""
    left, got = list(replies), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            got.append(dict(self.headers))
            status, headers, body = left.pop(0)
            self.send_response(status)
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


def test_a_key_is_told_to_nobody_else(monkeypatch):
    monkeypatch.setenv(KEY, "sesame-1\r\n")
    with answering((200, {}, b'{"x": 1}')) as (other, there):
        moved = (302, {"Location": f"{other}/v1/models"}, b"")
        with answering(moved, (401, {}, b"no such key: sesame-1")) as (url, got):
            assert asked(url) == 1
            with pytest.raises(UserError) as refused:
                asked(url)
    assert [headers["Authorization"] for headers in got] == ["Bearer sesame-1"] * 2
    assert "Authorization" not in there[0]
    assert "sesame" not in str(refused.value)
    monkeypatch.setenv(KEY, "ses\name")
    with pytest.raises(UserError, match=KEY) as refused:
        asked("http://127.0.0.1:9")
    assert "ses" not in str(refused.value)
