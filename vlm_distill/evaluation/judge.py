"""Let a language model judge answers: any OpenAI-compatible endpoint, asked once per prompt."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.saved_json import append_line, readable_lines
from vlm_distill.endpoint import Endpoint
from vlm_distill.models.thinking import split_thought
from vlm_distill.runtime.console import progress_line

from .prompts import options
from .scoring.mathvista import found_value
from .scoring.multiple_choice_vlmevalkit import closed
from .scoring.scores import Row

KEY_VARIABLE = "JUDGE_API_KEY"
#: The reason in ``Scores.fallbacks`` for rows without a readable reply.
UNREADABLE = "an unreadable reply of the judge"
_LARGEST_REPLY = 4 * 2**20
_LONGEST_VALUE = 200


@dataclass(frozen=True)
class Patience:
    """How long to wait for a reply, and how often to try.

    Attributes:
        retries: tries after the first, on time-outs, lost connections and errors of the server.
        timeout: seconds for one request in total.
        wait: seconds before the first retry; each further one waits twice as long.
    """

    retries: int = 5
    timeout: float = 120.0
    wait: float = 1.0


class Judge:
    """Asks a model for replies, at temperature 0, and keeps them.

    Args:
        url: base address of the endpoint, such as ``http://localhost:8000/v1``.
        model: the model's name there.
        cache: a JSONL file of replies; a prompt that has one is not sent again.
        requests_per_minute: the most that are sent, retries included.
        workers: requests in flight at once.
        patience: how long to wait for a reply, and how often to try.
        progress: called with (replies, prompts in all) after each reply.

    An API key is read from the environment variable ``JUDGE_API_KEY``.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path,
        *,
        requests_per_minute: float | None = None,
        workers: int = 4,
        patience: Patience = Patience(),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._endpoint = Endpoint(
            "judge",
            url,
            KEY_VARIABLE,
            retries=patience.retries,
            timeout=patience.timeout,
            wait=patience.wait,
            largest=_LARGEST_REPLY,
            turn=self._take_turn,
        )
        self.model, self.cache, self.workers = model, cache, workers
        self._progress = progress
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        kept = readable_lines(cache) if cache.is_file() else ()
        self._replies: dict[str, str] = {}
        for entry in kept:
            if isinstance(entry, dict) and isinstance(key := entry.get("key"), str):
                if entry.get("reply") is None:  # forgotten
                    self._replies.pop(key, None)
                else:
                    self._replies[key] = str(entry["reply"])

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """Return the replies in the order of the prompts; equal prompts are sent once.

        Raises:
            UserError: the endpoint refuses, or all retries failed. Replies received so far are in the cache.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if self._key(prompt) not in self._replies]
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._reply, prompt) for prompt in new]
            try:
                for done, future in enumerate(futures, start=1):
                    future.result()
                    if self._progress is not None:
                        self._progress(done, len(futures))
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        return [self._replies[self._key(prompt)] for prompt in prompts]

    def forget(self, prompts: Sequence[str]) -> None:
        """Drop the replies to these prompts from the cache, so that the next command asks again."""
        for prompt in prompts:
            key = self._key(prompt)
            if self._replies.pop(key, None) is not None:
                append_line(self.cache, {"key": key, "model": self.model, "prompt": prompt, "reply": None})

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.model}\0{prompt}".encode()).hexdigest()

    def _reply(self, prompt: str) -> None:
        reply = self._request(prompt)
        entry = {"key": self._key(prompt), "model": self.model, "prompt": prompt, "reply": reply}
        with self._lock:
            self._replies[entry["key"]] = reply
            append_line(self.cache, entry)

    def _request(self, prompt: str) -> str:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        advice = f"replies so far are kept in {self.cache}, start again to go on"
        return self._endpoint.ask("chat/completions", body, _content, advice)

    def _take_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        time.sleep(turn - now)


def open_judge(url: str | None, model: str, requests_per_minute: float | None, out: Path) -> Judge | None:
    """Return the judge at an address, which keeps its replies in ``out``; ``None`` without an address."""
    if url is None:
        return None
    show = progress_line("judge, replies")
    return Judge(url, model, out / "judge.jsonl", requests_per_minute=requests_per_minute, progress=show)


def _content(reply: Any) -> str:
    """Return a reply's text; empty if it was cut, because a number cut short looks like another number."""
    choice = reply["choices"][0]
    content = choice["message"]["content"]
    if content is None or choice.get("finish_reason") == "length":
        return ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    return content


@dataclass(frozen=True)
class _Task:
    """What a judge is asked about an answer. The wording is this project's own.

    Attributes:
        prompt: a template with a row's columns.
        form: completes "Reply with …".
        read: returns the verdict in a reply whose reasoning was removed; ``None`` if the reply has another form.
        unreadable: the verdict if no reply could be read.
    """

    prompt: str
    form: str
    read: Callable[[str, Row], str | None]
    unreadable: str = ""


def _letter(reply: str, row: Row) -> str | None:
    """Return the letter in a reply such as "B", "(b)" or "B. Paris"."""
    found = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?(?:\s+(.+))?", reply)
    if found is None:
        return None
    letter, text = found[1].upper(), found[2]
    choices = options(row)
    if letter not in choices and letter != "Z":
        return None
    return letter if text is None or _bare(text).lower() == _bare(choices.get(letter, "")).lower() else None


def _value(reply: str, row: Row) -> str | None:
    """Return a reply that is a value of the type that a row of MathVista asks for."""
    if not reply or "\n" in reply or len(reply) > _LONGEST_VALUE:
        return None
    if row["question_type"] == "multi_choice":
        return reply if found_value(row, reply) is not None else None
    if row["answer_type"] not in ("integer", "float"):
        return reply
    try:
        float(reply)
    except ValueError:
        return None
    return reply


def _grade(reply: str, row: Row) -> str | None:
    return reply if re.fullmatch(r"0?\.[0-9]+|0|1(?:\.0+)?", reply) else None


def _one_of(*words: str) -> Callable[[str, Row], str | None]:
    """Return a reader of replies that are one of these words, in any case."""
    return lambda reply, row: next((word for word in words if word.lower() == reply.lower()), None)


_CHOOSE = _Task(
    """A person answered a multiple-choice question. Which option does the answer mean?
Question: {question}
Options:
{options}
Answer: {prediction}
Reply with the option's letter alone, or with Z if the answer means none of them.""",
    "the option's letter",
    _letter,
)
_EXTRACT = _Task(
    """A person answered a question. Reply with nothing but the final value of the answer, as short as it can be: \
a number, a word, a list, or the letter of a choice.
Question: {question}
Answer: {prediction}
Final value:""",
    "the final value: a number without its unit, a word, a list, or the letter of a choice",
    _value,
)
_RATE = _Task(
    """Grade an answer to a question about a picture by comparing it with the right answer. <AND> joins parts \
that must all be there, <OR> parts of which one suffices. 0.0 is wrong, 1.0 right, in steps of 0.1.
Question: {question}
Right answer: {answer}
Answer: {prediction}
Reply with the number alone:""",
    "a number from 0.0 to 1.0",
    _grade,
    unreadable="0.0",
)
_COMPARE = _Task(
    """Compare an answer to a yes-or-no question with the right one.
Question: {question}
Right answer: {right}
Answer: {prediction}
Reply with one figure: 1 if it means the same, 0 if it contradicts it, 2 if it says neither.""",
    "one figure, 0, 1 or 2",
    _one_of("0", "1", "2"),
    unreadable="2",
)
_YES_OR_NO = _Task(
    """A person answered a yes-or-no question. Does the answer mean yes or no?
Question: {question}
Answer: {prediction}
Reply with one word: Yes, No, or Unknown if the answer means neither.""",
    "one word: Yes, No or Unknown",
    _one_of("Yes", "No", "Unknown"),
    unreadable="Unknown",
)
_TASKS = {"mmvet": _RATE, "mathvista": _EXTRACT, "pope": _YES_OR_NO, "mme": _YES_OR_NO}


def ask_judge(judge: Judge, scorer: str, rules: str, rows: Sequence[dict[str, Any]]) -> int:
    """Fill the column ``judge`` of a benchmark's rows.

    A reply is read without the reasoning before it and must have the form that the prompt asks for. If it has another
    form, the judge is asked once more with a reminder. Replies that remain unreadable are not kept.

    Args:
        judge: who is asked.
        scorer, rules: decide what is asked.
        rows: with ``question``, ``prediction`` and the other columns that the prompt names.

    Returns:
        The number of rows without a readable reply.
    """
    task = _TASKS.get(scorer, _CHOOSE)
    if scorer == "hallusionbench":
        task = _YES_OR_NO if rules == "vlmevalkit" else _COMPARE
    shown = [closed(row) if scorer == "mmmu" else row for row in rows]
    prompts = [_prompt(task, row) for row in shown]
    read = [_read(task, reply, row) for reply, row in zip(judge.ask(prompts), shown, strict=True)]
    again = [i for i, verdict in enumerate(read) if verdict is None]
    reminders = [f"{prompts[i]}\n\nReply with {task.form} and nothing else." for i in again]
    for i, reply in zip(again, judge.ask(reminders), strict=True):
        read[i] = _read(task, reply, shown[i])
    unread = [place for place, i in enumerate(again) if read[i] is None]
    judge.forget([*(prompts[again[place]] for place in unread), *(reminders[place] for place in unread)])
    for row, verdict in zip(rows, read, strict=True):
        row["judge"] = task.unreadable if verdict is None else verdict
    return read.count(None)


def _prompt(task: _Task, row: Row) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in options(row).items())
    right = row.get("gt_answer_details") or row.get("answer", "")
    return task.prompt.format_map({"answer": "", "right": right, **row, "options": choices})


def _read(task: _Task, reply: str, row: Row) -> str | None:
    return task.read(_bare(split_thought(reply)[0]), row)


def _bare(text: str) -> str:
    """Return a text without surrounding Markdown marks, quotation marks and a full stop."""
    return text.strip(" \t\r\n*_`\"'").removesuffix(".").strip(" \t\r\n*_`\"'")
