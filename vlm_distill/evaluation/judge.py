"""A language model that judges answers: any OpenAI-compatible endpoint, asked once for each prompt."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlm_distill.endpoint import Endpoint

from . import jsonl
from .prompts import options

KEY_VARIABLE = "JUDGE_API_KEY"
_LARGEST_REPLY = 4 * 2**20


class Judge:
    """Replies to prompts, at temperature 0.

    Args:
        url: the endpoint's base, as in ``http://localhost:8000/v1``.
        model: the model's name there.
        cache: a JSONL file; a prompt that it holds a reply to is never sent again.
        requests_per_minute: no more than so many are sent, retries included.
        workers: requests under way at once.
        retries: tries after the first, on time-outs, lost connections and the server's own troubles.
        timeout: seconds for one request in total.
        wait: seconds before the first retry; each further one waits twice as long.

    The key, if the endpoint wants one, is read from the environment variable ``JUDGE_API_KEY``.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path,
        *,
        requests_per_minute: float | None = None,
        workers: int = 4,
        retries: int = 5,
        timeout: float = 120.0,
        wait: float = 1.0,
    ) -> None:
        self._endpoint = Endpoint(
            "judge",
            url,
            KEY_VARIABLE,
            retries=retries,
            timeout=timeout,
            wait=wait,
            largest=_LARGEST_REPLY,
            turn=self._take_turn,
        )
        self.model, self.cache, self.workers = model, cache, workers
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        kept = jsonl.entries(cache) if cache.is_file() else ()
        whole = (entry for entry in kept if isinstance(entry, dict) and {"key", "reply"} <= entry.keys())
        self._replies: dict[str, str] = {entry["key"]: entry["reply"] for entry in whole}

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The replies, in the order of the prompts; equal prompts are sent once.

        Raises:
            UserError: the endpoint refuses, or does not answer after all retries. Replies until then are in the cache.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if self._key(prompt) not in self._replies]
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._reply, prompt) for prompt in new]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        return [self._replies[self._key(prompt)] for prompt in prompts]

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(f"{self.model}\0{prompt}".encode()).hexdigest()

    def _reply(self, prompt: str) -> None:
        reply = self._request(prompt)
        entry = {"key": self._key(prompt), "model": self.model, "prompt": prompt, "reply": reply}
        with self._lock:
            self._replies[entry["key"]] = reply
            jsonl.append(self.cache, entry)

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


def _content(reply: Any) -> str:
    content = reply["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError("the reply has no text")
    return content


# What is asked for each kind of answer. The wording is this project's own: numbers of other judges and prompts differ.

_LETTER = """A person answered a multiple-choice question. Which option does the answer mean?
Question: {question}
Options:
{options}
Answer: {prediction}
Reply with the option's letter alone, or with Z if the answer means none of them."""
_VALUE = """A person answered a question. Reply with nothing but the final value of the answer, as short as it can be: \
a number, a word, a list, or the letter of a choice.
Question: {question}
Answer: {prediction}
Final value:"""
_GRADE = """Grade an answer to a question about a picture by comparing it with the right answer. <AND> joins parts \
that must all be there, <OR> parts of which one suffices. 0.0 is wrong, 1.0 right, in steps of 0.1.
Question: {question}
Right answer: {answer}
Answer: {prediction}
Reply with the number alone:"""
_VERDICT = """Compare an answer to a yes-or-no question with the right one.
Question: {question}
Right answer: {right}
Answer: {prediction}
Reply with one figure: 1 if it means the same, 0 if it contradicts it, 2 if it says neither."""


def ask_judge(judge: Judge, scorer: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A judge's replies to rows of a benchmark, as the scorer takes them in the column ``judge``.

    Args:
        judge: see above.
        scorer: the scorer's name.
        rows: with ``question``, ``prediction`` and what else the prompt names.
    """
    replies = judge.ask([_prompt(scorer, row) for row in rows])
    if scorer == "mmvet":
        return [_grade(reply) for reply in replies]
    if scorer == "hallusionbench":
        return [next((c for c in reply if c in "012"), "2") for reply in replies]
    return [reply.strip() for reply in replies]


def _prompt(scorer: str, row: Mapping[str, Any]) -> str:
    cells = {"answer": "", "right": row.get("gt_answer_details") or row.get("answer", ""), **row}
    if scorer == "mmvet":
        return _GRADE.format_map(cells)
    if scorer == "mathvista":
        return _VALUE.format_map(cells)
    if scorer == "hallusionbench":
        return _VERDICT.format_map(cells)
    cells["options"] = "\n".join(f"{letter}. {text}" for letter, text in options(row).items())
    return _LETTER.format_map(cells)


def _grade(reply: str) -> str:
    """The first number in 0…1 of a reply; 0 where there is none."""
    numbers = (float(found) for found in re.findall(r"\d*\.?\d+", reply))
    return str(next((number for number in numbers if 0 <= number <= 1), 0.0))
