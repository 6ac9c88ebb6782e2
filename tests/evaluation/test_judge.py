"""The judge: its client against a server of this process, and how its replies are read."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.errors import UserError
from vlm_distill.evaluation.judge import Judge, Patience, ask_judge
from vlm_distill.evaluation.scoring.scorers import score


class Server(ThreadingHTTPServer):
    """Answers a prompt with itself in capitals, or with ``content``, after the statuses in ``troubles``."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles, self.requests, self.times = [], [], []
        self.content = None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        self.server.times.append(time.monotonic())
        status = self.server.troubles.pop(0) if self.server.troubles else 200
        said = body["messages"][0]["content"].upper()
        content = self.server.content or {"choices": [{"message": {"content": said}}]}
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
    patience = Patience(wait=0.01, retries=options.pop("retries", 2), timeout=options.pop("timeout", 120.0))
    return Judge(server.url, "judge-1", tmp_path / "cache.jsonl", patience=patience, **options)


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
    judge = Judge("http://127.0.0.1:9/v1", "judge-1", tmp_path / "cache.jsonl", patience=Patience(retries=0))
    with pytest.raises(UserError, match="did not answer: "):
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


class Friend:
    """A judge with a reply for each call."""

    def __init__(self, *replies):
        self.replies, self.prompts = list(replies), []

    def ask(self, prompts):
        self.prompts += prompts
        return [self.replies.pop(0) for _ in prompts]

    def forget(self, prompts):
        pass


CHOICE = {"question": "Which?", "A": "oak", "B": "a pine", "answer": "B", "prediction": "hm"}
MATH = {"question": "How many?", "question_type": "free_form", "answer_type": "float", "prediction": "some"}
YES = {"question": "Is it?", "answer": "Yes", "prediction": "It is."}


@pytest.mark.parametrize(
    ("scorer", "rules", "row", "reply", "read"),
    [
        *(("mmvet", "vlmevalkit", YES, good, good) for good in ("0", "0.0", "1", "1.0", "0.35", ".5")),
        ("mmvet", "vlmevalkit", YES, "**0.4**.\n", "0.4"),
        ("mmvet", "vlmevalkit", YES, "<think>There is 1 image … 0 of them</think> 0.0", "0.0"),
        ("mmvet", "vlmevalkit", YES, "there is 1 image</think>\n\n0.5", "0.5"),
        *(
            ("mmvet", "vlmevalkit", YES, bad, None)
            for bad in (
                "-1",
                "7",
                "1.1",
                "2.0",
                "0.5/1.0",
                "1e-1",
                "1.0 would be right, but this is wrong: 0.0",
                "<think>1.0",
                "I give 1.0",
                "NaN",
                "１",
                "",
            )
        ),
        *(
            ("mmstar", "vlmevalkit", CHOICE, good, "B")
            for good in ("B", "b", "(B)", "B.", "**B**", "B. a pine", "B: A Pine.")
        ),
        ("mmstar", "vlmevalkit", CHOICE, "Z", "Z"),
        *(("mmstar", "vlmevalkit", CHOICE, bad, None) for bad in ("C", "A or B", "B. oak", "It means A", "a pine")),
        ("mmmu", "vlmevalkit", {**CHOICE, "A": None, "B": None, "answer": "12"}, "A", "A"),
        *(("pope", "vlmevalkit", YES, good, "Yes") for good in ("yes", "Yes.", "YES")),
        ("mme", "vlmevalkit", YES, "unknown", "Unknown"),
        ("hallusionbench", "vlmevalkit", YES, "No", "No"),
        *(("pope", "vlmevalkit", YES, bad, None) for bad in ("Yes, it says so", "maybe", "1")),
        ("hallusionbench", "lmms-eval", YES, "2", "2"),
        *(("hallusionbench", "lmms-eval", YES, bad, None) for bad in ("10", "It is 1", "3", "Yes")),
        ("mathvista", "vlmevalkit", MATH, "2.50", "2.50"),
        ("mathvista", "vlmevalkit", MATH, "2.50 cm", None),
        ("mathvista", "vlmevalkit", {**MATH, "answer_type": "text"}, "a red car", "a red car"),
        ("mathvista", "vlmevalkit", {**MATH, "answer_type": "text"}, "It is red.\nOr blue.", None),
        ("mathvista", "vlmevalkit", {**MATH, "question_type": "multi_choice", "choices": ["1", "2"]}, "B", "B"),
        ("mathvista", "lmms-eval", {**MATH, "question_type": "multi_choice", "choices": ["1", "2"]}, "both", None),
    ],
)
def test_a_reply_is_read_by_the_form_that_was_asked_for(scorer, rules, row, reply, read):
    row, friend = dict(row), Friend(reply, reply)
    unreadable = ask_judge(friend, scorer, rules, [row])
    assert unreadable == (read is None)
    assert len(friend.prompts) == 1 + unreadable
    if read is not None:
        assert row["judge"] == read


def test_an_unreadable_reply_is_asked_for_once_more():
    friend = Friend("It means the second", "B")
    row = dict(CHOICE)
    assert ask_judge(friend, "mmstar", "vlmevalkit", [row]) == 0
    assert row["judge"] == "B"
    assert friend.prompts[1].endswith("Reply with the option's letter and nothing else.")


def test_unreadable_replies_are_asked_for_again_by_the_next_command(server, tmp_path):
    rows = [{**YES, "prediction": "so it seems"}]
    said = {"choices": [{"message": {"content": "perhaps"}}]}
    server.content = said
    assert ask_judge(make(server, tmp_path), "pope", "vlmevalkit", rows) == 1
    assert ask_judge(make(server, tmp_path), "pope", "vlmevalkit", rows) == 1
    assert len(server.requests) == 4
    said["choices"][0]["message"]["content"] = "Yes"
    for _ in range(2):
        assert ask_judge(make(server, tmp_path), "pope", "vlmevalkit", rows) == 0
        assert rows[0]["judge"] == "Yes"
    assert len(server.requests) == 5


@pytest.mark.parametrize("scorer", ["pope", "hallusionbench"])
def test_a_judge_decides_about_yes_and_no_where_the_answer_is_unknown(scorer):
    row = YES | {"index": "a_b_c_1_1_1", "category": "c", "l2-category": "d"}
    without = score(scorer, [row], "vlmevalkit")
    assert (without.main, list(without.judge)) == (0, [0])
    judged = score(scorer, [row | {"judge": "Yes"}], "vlmevalkit")
    assert (judged.main, list(judged.judge)) == (100, [])
    assert list(score(scorer, [row | {"judge": "Unknown"}], "vlmevalkit").judge) == []


@pytest.mark.parametrize(
    ("message", "reason", "reply"),
    [
        ({"content": None, "reasoning_content": "hm"}, "stop", ""),
        ({"content": "0."}, "length", ""),
        ({"content": [{"type": "text", "text": "0"}, {"type": "text", "text": ".5"}]}, "stop", "0.5"),
    ],
)
def test_a_reply_that_was_cut_or_comes_in_parts(server, tmp_path, message, reason, reply):
    server.content = {"choices": [{"message": message, "finish_reason": reason}]}
    assert make(server, tmp_path).ask(["a"]) == [reply]


def test_replies_are_kept_whatever_line_breaks_they_hold(server, tmp_path):
    server.content = {"choices": [{"message": {"content": "a\u2028b\x85c"}}]}
    for _ in range(2):
        assert make(server, tmp_path).ask(["a"]) == ["a\u2028b\x85c"]
    assert len(server.requests) == 1
