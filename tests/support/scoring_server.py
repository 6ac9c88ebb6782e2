"""A server as vLLM is one, for what is asked of it: scores, hidden states and answers of a real, tiny model."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

from data.batch import Encoded
from data.conversation import Conversation
from vlm_distill.models import load_vlm
from vlm_distill.models.answers import Answer, Sampling
from vlm_distill.models.interface import VisionLanguageModel

#: Paths that vLLM has with VLLM_SERVER_DEV_MODE alone.
CONTROLS = ["/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
#: Paths that vLLM has with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING alone.
ADAPTERS = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]


class ScoringServer(ThreadingHTTPServer):
    """Serves ``model`` as ``teacher-1``.

    Attributes:
        troubles: statuses to answer with first.
        refused: a status to answer requests with in which a text stands, by that text.
        told, tells_ids, repeats: whether it knows ``prompt_logprobs``, ``return_token_ids`` and ``echo``.
        shift: of its log-probabilities, which are none then.
        controlled: whether its weights can be exchanged, as with vLLM's VLLM_SERVER_DEV_MODE.
        adapts: whether it loads adapters.
        names: what it serves: itself, and adapters on it.
        loads: whether it then reads the new ones.
        loaded: the folders that it has been asked to read.
        tells_drawn: whether it returns the token ids of its answers.
        garbles: whether it writes its answers' text wrongly.
        pools: whether it returns hidden states instead of generating, as vLLM's pooling runner does.
        more: further paths, each with what makes the reply of the request's body.
        makes_fewer: whether it makes fewer tokens of an image than a processor here.
        drops: how many of a prompt's hidden states it leaves out.
        context: the most tokens of a prompt and its answer.
        delay: seconds that an answer takes at least.
        bodies: the requests so far.
        most: of so many at the same time.
    """

    request_queue_size = 128

    def __init__(self, model: VisionLanguageModel, *, pools: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.troubles, self.told, self.tells_ids = model, list[int](), True, True
        self.repeats, self.pools, self.makes_fewer, self.drops = True, pools, True, 0
        self.controlled, self.loads, self.loaded = True, True, list[str]()
        self.adapts, self.names = True, ["teacher-1"]
        self.tells_drawn, self.garbles = True, False
        self.more: dict[str, Callable[[Any], Any]] = {}
        self.refused: dict[str, int] = {}
        self.shift = 0.0
        self.context, self.delay, self.waiting, self.most = 4096, 0.0, 0, 0
        self.bodies: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def score_text(self, ids: list[int], top: int) -> list[dict[str, Any] | None]:
        nothing = torch.zeros(len(ids), dtype=torch.bool)
        return self._score(Encoded(torch.tensor(ids), nothing, nothing), top)

    def ids(self, body: dict[str, Any]) -> list[int]:
        """A prompt of text as ids."""
        if isinstance(body["prompt"], list):
            return body["prompt"]
        assert body["add_special_tokens"] is False
        return self.model.processor.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]

    def score_chat(self, body: dict[str, Any]) -> tuple[list[dict[str, Any] | None], list[int]]:
        """What is told of a conversation, and its ids."""
        row = self._chat(body)
        told = self._score(row, body["prompt_logprobs"])
        kept = self._kept(row)
        return [told[i] for i in kept], row.input_ids[kept].tolist()

    def tokens(self, body: dict[str, Any]) -> list[int]:
        """The tokens of a text or a conversation."""
        if "prompt" in body:
            return self.ids(body)
        row = self._chat(body)
        return row.input_ids[self._kept(row)].tolist()

    @torch.no_grad()
    def pool(self, body: dict[str, Any]) -> dict[str, Any]:
        """The hidden states of a prompt in base64."""
        wanted = body["task"], body["use_activation"], body["encoding_format"], body["endianness"]
        assert wanted == ("token_embed", False, "base64", "little")
        if "messages" in body:
            row = self._chat(body)
        else:
            ids = torch.tensor(body["input"])
            row = Encoded(ids, torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool))
        with self.lock:
            hidden = self.model(self.model.processor.collate([row]), torch.arange(len(row.input_ids))).hidden
        hidden = hidden[self._kept(row)]
        sent = hidden[self.drops :].to({"float32": torch.float32, "bfloat16": torch.bfloat16}[body["embed_dtype"]])
        data = base64.b64encode(sent.contiguous().view(torch.uint8).numpy().tobytes()).decode()
        return {"data": [{"index": 0, "data": data}], "usage": {"prompt_tokens": len(hidden)}}

    def _kept(self, row: Encoded) -> list[int]:
        """The positions of a prompt that this server has too, if it makes fewer tokens of an image."""
        seen = self.model.processor.image_tokens(row).nonzero().flatten().tolist() if self.makes_fewer else []
        return [i for i in range(len(row.input_ids)) if i not in seen[: len(seen) // 2]]

    def load(self, body: dict[str, Any]) -> None:
        """Exchange the weights."""
        assert body["method"] == "reload_weights"
        self.loaded.append(body["kwargs"]["weights_path"])
        if self.loads:
            with self.lock:
                self.model.load_state_dict(load_vlm(self.loaded[-1], dtype="float32").state_dict())

    def adapt(self, body: dict[str, Any]) -> None:
        """Load an adapter, which has a name of its own from now on. Only the last one is used."""
        self.load({"method": "reload_weights", "kwargs": {"weights_path": body["lora_path"]}})
        self.names.append(body["lora_name"])

    def answer(self, body: dict[str, Any]) -> tuple[Answer, list[int]]:
        """An answer, and the ids of its question."""
        if "messages" in body:
            row = self._chat(body)
        else:
            ids = torch.tensor(body["prompt"])
            row = Encoded(ids, torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool))
        temperature = body["temperature"]
        barred = "logit_bias" in body
        generators = [random.Random(body.get("seed"))]
        sampling = Sampling(temperature, generators) if temperature or barred else None
        with self.lock:
            # Of the tokens that must not be drawn, special ones are barred by Sampling anyway.
            head, never = self.model.head, {int(token) for token in body.get("logit_bias", {})}
            rows = range(len(head.parameters[0]))
            head.vocabulary = max(token for token in rows if token not in never) + 1
            (answer,) = self.model.answer([row], max_new_tokens=body["max_tokens"], sampling=sampling)
            head.vocabulary = None
        return answer, row.input_ids.tolist()

    def _chat(self, body: dict[str, Any]) -> Encoded:
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
        processor, generation = self.model.processor, body["add_generation_prompt"]
        asked = Conversation(tuple(messages))
        row = processor.encode(asked, images, generation=generation)
        starts = int(row.input_ids[0]) == processor.tokenizer.bos_token_id
        if starts and processor.adds_special_tokens(asked) and not body["add_special_tokens"]:
            row.input_ids, row.tensors["attention_mask"] = row.input_ids[1:], row.tensors["attention_mask"][:, 1:]
        return row

    @torch.no_grad()
    def _score(self, row: Encoded, top: int) -> list[dict[str, Any] | None]:
        """For every token but the first the likeliest ones before it and itself, in vLLM's form."""
        ids = row.input_ids.tolist()
        with self.lock:
            hidden = self.model(self.model.processor.collate([row]), torch.arange(len(ids) - 1)).hidden
            logprobs = self.model.head.logits(hidden).log_softmax(-1) + self.shift
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
        if self.path in self.server.more:
            self._reply(200, self.server.more[self.path](None))
            return
        if self.path != "/v1/models":
            self._reply(404, {"error": "not a path of this server"})
            return
        card = {"id": "teacher-1", "object": "model", "max_model_len": self.server.context}
        self._reply(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        body, server = json.loads(text), self.server
        with server.lock:
            server.bodies.append(body | {"key": self.headers.get("Authorization")})
            server.waiting += 1
            server.most = max(server.most, server.waiting)
            trouble = server.troubles.pop(0) if server.troubles else None
        time.sleep(server.delay)
        trouble = trouble or next((status for held, status in server.refused.items() if held in text), None)
        paths = ["/pooling"] if server.pools else ["/v1/completions", "/v1/chat/completions"]
        paths += ["/tokenize", *server.more]
        paths += [*(CONTROLS if server.controlled else []), *(ADAPTERS if server.adapts else [])]
        named = body["lora_name"] if "unload" in self.path else body.get("model", "teacher-1")
        known = named in server.names
        trouble = trouble if self.path in paths and known else 404
        status, content = (trouble, {"error": "as the test wants"}) if trouble else (200, self._content(body))
        with server.lock:
            server.waiting -= 1
        self._reply(status, content)

    def _content(self, body: dict[str, Any]) -> dict[str, Any] | str | None:
        server, chat = self.server, self.path == "/v1/chat/completions"
        if self.path in server.more:
            return server.more[self.path](body)
        if self.path == "/tokenize":
            return {"tokens": server.tokens(body)}
        if self.path == "/pooling":
            return server.pool(body)
        if self.path == "/collective_rpc":
            server.load(body)
            return {"results": [None]}
        if self.path in ADAPTERS:
            if "unload" in self.path:
                server.names.remove(body["lora_name"])
            else:
                server.adapt(body)
            return "Success: told in plain text."
        if self.path in CONTROLS:
            return {"success": True} if self.path == "/reset_prefix_cache" else None
        if body.get("echo") and server.repeats:
            assert server.told is False, "asked only for what it does not know otherwise"
            scores = server.score_text(server.ids(body), 0)[1:]
            own = [entry[str(token)]["logprob"] for entry, token in zip(scores, body["prompt"][1:], strict=True)]
            return {"choices": [{"index": 0, "text": "x", "logprobs": {"token_logprobs": [None, *own, -1.0]}}]}
        if "prompt_logprobs" not in body:
            return self._answer(body, chat)
        if chat:
            told, ids = server.score_chat(body)
            return {"choices": [], "prompt_logprobs": told, "prompt_token_ids": ids if server.tells_ids else None}
        told = server.score_text(server.ids(body), body["prompt_logprobs"]) if server.told else None
        return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": told}]}

    def _answer(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        server = self.server
        answer, prompt = server.answer(body)
        text = "no" if server.garbles else f" {answer.text}"
        told = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if chat:
            told["logprobs"] = {"content": [{"logprob": value} for value in answer.logprobs]}
        else:
            told["logprobs"] = {"token_logprobs": answer.logprobs}
        drawn = {"token_ids": answer.token_ids} if server.tells_drawn and body.get("return_token_ids") else {}
        reason = "stop" if answer.complete else "length"
        reply = {"choices": [{"index": 0, **told, **drawn, "finish_reason": reason}]}
        return reply | ({"prompt_token_ids": prompt} if chat else {})

    def _reply(self, status: int, content: Any) -> None:
        reply = content if isinstance(content, str) else "" if content is None else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply.encode())))
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(model: VisionLanguageModel, *, pools: bool = False) -> Iterator[ScoringServer]:
    server = ScoringServer(model, pools=pools)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
