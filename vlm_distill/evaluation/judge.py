"""A language model that judges answers: any OpenAI-compatible endpoint, asked once for each prompt."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.errors import UserError

KEY_VARIABLE = "JUDGE_API_KEY"
_LATER = (408, 409, 429, 500, 502, 503, 504)  # what may go well on another try
_LONGEST_WAIT = 60.0


class Judge:
    """Replies to prompts, at temperature 0.

    Args:
        url: the endpoint's base, as in ``http://localhost:8000/v1``.
        model: the model's name there.
        cache: a JSONL file; a prompt that it holds a reply to is never sent again.
        requests_per_minute: no more than so many are sent, retries included.
        workers: requests under way at once.
        retries: tries after the first, on time-outs, lost connections and the server's own troubles.
        timeout: seconds for one request.
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
        if not url.startswith(("http://", "https://")):
            raise UserError(f"judge: '{url}' is no address; give one such as http://localhost:8000/v1")
        self.url, self.model, self.cache = url.rstrip("/"), model, cache
        self.workers, self.retries, self.timeout, self.wait = workers, retries, timeout, wait
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._replies = dict(_read(cache)) if cache.is_file() else {}

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
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a", encoding="utf-8") as file:
                # The line break comes first, so that a line which a kill cut short spoils no other.
                file.write("\n" + json.dumps(entry, ensure_ascii=False))

    def _request(self, prompt: str) -> str:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            self._take_turn()
            wait = min(self.wait * 2**attempt, _LONGEST_WAIT)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _content(json.load(response))
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code} {error.reason}"
                if error.code not in _LATER:
                    detail = " ".join(error.read(300).decode("utf-8", "replace").split())
                    raise UserError(f"judge: {self.url} refuses: {trouble}: {detail}") from None
                asked = error.headers.get("Retry-After", "")
                wait = min(float(asked), _LONGEST_WAIT) if asked.isdecimal() else wait
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                # A lost connection, a time-out, or a reply that is not what the protocol says.
                trouble = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(wait)
        raise UserError(
            f"judge: {self.url} did not answer in {self.retries + 1} tries, the last: {trouble}; "
            f"replies so far are kept in {self.cache}, start again to go on"
        )

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


def _read(cache: Path) -> Iterator[tuple[str, str]]:
    for line in cache.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
            yield entry["key"], entry["reply"]
        except (ValueError, KeyError, TypeError):
            continue  # empty or cut short: asked again
