"""A server as vLLM is one, for what is asked of it: prompts' log-probabilities by a real, tiny model."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

from data.batch import Encoded
from data.conversation import Conversation
from vlm_distill.models.interface import VisionLanguageModel


class ScoringServer(ThreadingHTTPServer):
    """Serves ``model`` as ``teacher-1``.

    Attributes:
        troubles: statuses to answer with first.
        told: whether it knows ``prompt_logprobs``.
        bodies: the requests so far.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.troubles, self.told = model, list[int](), True
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def score_text(self, ids: list[int], top: int) -> list[dict[str, Any] | None]:
        nothing = torch.zeros(len(ids), dtype=torch.bool)
        return self._score(Encoded(torch.tensor(ids), nothing, nothing), top)

    def score_chat(self, body: dict[str, Any]) -> list[dict[str, Any] | None]:
        assert body["add_generation_prompt"] is False
        images = []

        def part(given: dict[str, Any]) -> dict[str, Any]:
            if given["type"] == "text":
                return given
            assert given["type"] == "image_url"
            kind, _, data = given["image_url"]["url"].partition(",")
            assert kind == "data:image/png;base64"
            images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
            return {"type": "image"}

        messages = [{"role": m["role"], "content": [part(p) for p in m["content"]]} for m in body["messages"]]
        row = self.model.processor.encode(Conversation(tuple(messages)), images)
        told = self._score(row, body["prompt_logprobs"])
        # As a server that makes fewer tokens of an image.
        seen = self.model.processor.image_tokens(row).nonzero().flatten().tolist()
        return [entry for i, entry in enumerate(told) if i not in seen[: len(seen) // 2]]

    @torch.no_grad()
    def _score(self, row: Encoded, top: int) -> list[dict[str, Any] | None]:
        """For every token but the first the likeliest ones before it and itself, in vLLM's form."""
        ids = row.input_ids.tolist()
        with self.lock:
            hidden = self.model(self.model.processor.collate([row]), torch.arange(len(ids) - 1)).hidden
            logprobs = self.model.head.logits(hidden).log_softmax(-1)
        told: list[dict[str, Any] | None] = [None]
        for own, values in zip(ids[1:], logprobs, strict=True):
            order = values.argsort(descending=True).tolist()
            # Without a rule for their order: whoever reads this must rank them.
            kept = sorted({*order[:top], own})
            told.append({str(i): {"logprob": max(float(values[i]), -9999.0), "rank": order.index(i) + 1} for i in kept})
        return told


class _Handler(BaseHTTPRequestHandler):
    server: ScoringServer

    def do_GET(self) -> None:
        self._reply(200, {"object": "list", "data": [{"id": "teacher-1", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body | {"key": self.headers.get("Authorization")})
        if self.server.troubles:
            self._reply(self.server.troubles.pop(0), {"error": "as the test wants"})
            return
        if self.path == "/v1/chat/completions":
            self._reply(200, {"choices": [], "prompt_logprobs": self.server.score_chat(body)})
            return
        assert self.path == "/v1/completions"
        told = self.server.score_text(body["prompt"], body["prompt_logprobs"]) if self.server.told else None
        self._reply(200, {"choices": [{"index": 0, "text": "x", "prompt_logprobs": told}]})

    def _reply(self, status: int, content: Any) -> None:
        reply = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(model: VisionLanguageModel) -> Iterator[ScoringServer]:
    server = ScoringServer(model)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
