"""A server as vLLM is one, for what is asked of it: prompts' log-probabilities by a real, tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from data.batch import Encoded
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

    @torch.no_grad()
    def score(self, ids: list[int], top: int) -> list[dict[str, Any] | None]:
        """For every token but the first the likeliest ones before it and itself, in vLLM's form."""
        nothing = torch.zeros(len(ids), dtype=torch.bool)
        processor = self.model.processor
        tensors = {"image_mask": nothing} if processor.has_vision else {}
        row = Encoded(torch.tensor(ids), nothing, nothing, tensors=tensors)
        with self.lock:
            hidden = self.model(processor.collate([row]), torch.arange(len(ids) - 1)).hidden
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
        assert self.path == "/v1/completions"
        told = self.server.score(body["prompt"], body["prompt_logprobs"]) if self.server.told else None
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
