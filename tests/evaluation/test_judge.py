"""The judge's client against a server of this process: each prompt once, retries, refusals, and what is kept."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.errors import UserError
from vlm_distill.evaluation.judge import Judge


class Server(ThreadingHTTPServer):
    """Answers a prompt with itself in capitals, after the statuses in ``troubles``."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles, self.requests, self.times = [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        self.server.times.append(time.monotonic())
        status = self.server.troubles.pop(0) if self.server.troubles else 200
        content = {"choices": [{"message": {"content": body["messages"][0]["content"].upper()}}]}
        reply = b"garbage" if status == "garbage" else json.dumps(content).encode()
        self.send_response(200 if status == "garbage" else status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def make(server, tmp_path, **options):
    return Judge(server.url, "judge-1", tmp_path / "cache.jsonl", **{"wait": 0.01, "retries": 2, **options})


def test_replies_come_in_order_and_equal_prompts_are_sent_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    prompts = [f"is {i % 7} right?" for i in range(20)]
    assert make(server, tmp_path).ask(prompts) == [prompt.upper() for prompt in prompts]
    assert len(server.requests) == 7
    path, body, key = server.requests[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "judge-1"
    assert body["temperature"] == 0
    assert key == "Bearer secret"


def test_a_cached_reply_is_never_asked_for_again(server, tmp_path):
    make(server, tmp_path).ask(["a", "b"])
    assert make(server, tmp_path).ask(["b", "c"]) == ["B", "C"]
    assert len(server.requests) == 3
    other = Judge(server.url, "judge-2", tmp_path / "cache.jsonl")
    other.ask(["a"])
    assert len(server.requests) == 4


@pytest.mark.parametrize("trouble", [429, 503, "garbage"])
def test_troubles_that_pass_are_tried_again(server, tmp_path, trouble):
    server.troubles = [trouble, trouble]
    assert make(server, tmp_path, workers=1).ask(["a"]) == ["A"]
    assert len(server.requests) == 3


def test_what_does_not_pass_ends_in_one_line_and_keeps_the_rest(server, tmp_path):
    judge = make(server, tmp_path, workers=1)
    judge.ask(["a"])
    server.troubles = [500] * 3
    with pytest.raises(UserError, match="did not answer in 3 tries, the last: HTTP 500"):
        judge.ask(["b"])
    assert make(server, tmp_path).ask(["a"]) == ["A"]
    server.troubles = [401]
    with pytest.raises(UserError, match="refuses: HTTP 401"):
        judge.ask(["c"])
    assert len(server.requests) == 5


def test_nobody_there(tmp_path):
    judge = Judge("http://127.0.0.1:9/v1", "judge-1", tmp_path / "cache.jsonl", retries=0)
    with pytest.raises(UserError, match="did not answer in 1 tries"):
        judge.ask(["a"])
    with pytest.raises(UserError, match="is not an address"):
        Judge("localhost:9", "judge-1", tmp_path / "cache.jsonl")


def test_no_more_requests_than_are_allowed(server, tmp_path):
    make(server, tmp_path, requests_per_minute=1200).ask([str(i) for i in range(6)])
    assert server.times[-1] - server.times[0] >= 5 * 0.05 - 0.02


def test_a_line_that_a_kill_cut_short_is_asked_again(server, tmp_path):
    make(server, tmp_path).ask(["a", "b"])
    cache = tmp_path / "cache.jsonl"
    cache.write_text(cache.read_text()[:-20])
    judge = make(server, tmp_path)
    assert judge.ask(["a", "b"]) == ["A", "B"]
    assert make(server, tmp_path).ask(["a", "b"]) == ["A", "B"]
    assert len(server.requests) == 3
