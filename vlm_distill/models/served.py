"""A teacher behind an OpenAI-compatible server: its likeliest tokens at every place of an answer (vLLM)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from data.batch import DistillationBatch
from data.conversation import Conversation
from data.errors import UserError
from vlm_distill.endpoint import Endpoint
from vlm_distill.losses import TopKTargets

from .interface import Processor, VisionLanguageModel
from .pretrained import template_ends
from .teacher import Teacher, TeacherOutputs
from .vocabulary import cut_head
from .weightless import weightless

KEY_VARIABLE = "OPENAI_API_KEY"
# A server computes in float32 at best: what is left beside its likeliest tokens is not known more exactly than this.
_LEAST_TAIL = 1e-7

#: Tokens and their log-probabilities at one place.
Likeliest = Mapping[int, float]


class ServedTeacher(Teacher):
    """Scores prompts that hold the answers, by ``prompt_logprobs`` as vLLM serves them since version 0.6.

    Text goes as token ids to ``/completions``, so that no tokenizer of the server's has a part in it. With images a
    conversation goes to ``/chat/completions``: the server renders it and expands the images as it likes, and places are
    counted from the end, where nothing but the answers and what the chat template puts around them is.

    Args:
        processor: the teacher's, from its folder or name here; the server's must be the same.
        endpoint: the server.
        model: the model's name there.
        top: how many of the likeliest tokens are asked for. vLLM gives 20 unless it is started with more
            (``--max-logprobs``).
        workers: requests under way at once, of this rank.

    Raises:
        UserError: there is no such model there, or the server does not tell the prompt's log-probabilities.
    """

    def __init__(self, processor: Processor, endpoint: Endpoint, model: str, top: int, workers: int) -> None:
        self.processor, self.endpoint, self.model, self.top = processor, endpoint, model, top
        self.needs_images = processor.has_vision
        self._ends = template_ends(processor)
        self._vocabulary: int | None = None
        self._pool = ThreadPoolExecutor(workers)
        if weightless():
            return  # nobody need be there yet
        served = self.endpoint.ask("models", None, lambda reply: [str(entry["id"]) for entry in reply["data"]])
        if model not in served:
            raise UserError(f"teacher.server.model: {endpoint.url} serves {', '.join(served)}, no {model}")
        self._try()

    @property
    def end_tokens(self) -> set[int]:
        return super().end_tokens | self._ends

    def align(self, student: VisionLanguageModel) -> None:
        """Cuts the student's head, and what the server tells, to the ids that both share; raises as ``cut_head``."""
        self._vocabulary = cut_head(student, self.processor.tokenizer)

    @torch.no_grad()
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        assert batch.teacher is not None
        assert not features
        inputs = {name: batch.teacher.inputs[name].cpu() for name in ("input_ids", "attention_mask")}
        rows, length = inputs["input_ids"].shape
        positions = batch.teacher.positions.cpu()
        waiting = []
        for row in range(rows):
            # Padding is on the right: a place in the row is one in the request.
            places = (positions[positions // length == row] % length + 1).tolist()
            if places:
                ids = inputs["input_ids"][row, : int(inputs["attention_mask"][row].sum())].tolist()
                conversation, images = batch.conversations[row] if self.needs_images else (None, ())
                if isinstance(conversation, Conversation) and images:
                    waiting.append(self._pool.submit(self._score_seen, conversation, images, ids, places))
                else:
                    waiting.append(self._pool.submit(self._score, ids, places))
        found = [likeliest for future in waiting for likeliest in future.result()]
        return TeacherOutputs(self._targets(found, batch.targets.device))

    def _score(self, ids: list[int], places: Sequence[int]) -> list[Likeliest]:
        """What the teacher expects at some places of a row of text."""

        def read(reply: Any) -> list[Likeliest]:
            told = reply["choices"][0]["prompt_logprobs"]
            if len(told) != len(ids):
                raise ValueError(f"{len(told)} places for a prompt of {len(ids)} tokens")
            return [self._likeliest(told[place], ids[place]) for place in places]

        return self.endpoint.ask("completions", self._request(ids), read)

    def _score_seen(
        self, conversation: Conversation, images: Sequence[Image.Image], ids: list[int], places: Sequence[int]
    ) -> list[Likeliest]:
        """The same of a conversation with images, whose row here is ``ids``."""
        remaining = iter(images)

        def part(own: Mapping[str, Any]) -> dict[str, Any]:
            return {"type": "text", "text": own["text"]} if own["type"] == "text" else _image_part(next(remaining))

        def read(reply: Any) -> list[Likeliest]:
            told = reply["prompt_logprobs"]
            return [self._likeliest(told[place - len(ids)], ids[place]) for place in places]

        messages = [{"role": m["role"], "content": [part(own) for own in m["content"]]} for m in conversation.messages]
        body = {"messages": messages, "add_generation_prompt": False, **self._asked}
        return self.endpoint.ask("chat/completions", body, read)

    @property
    def _asked(self) -> dict[str, Any]:
        # One token is generated since servers refuse to generate none; it is not looked at.
        return {"model": self.model, "max_tokens": 1, "prompt_logprobs": self.top}

    def _request(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"prompt": list(ids), **self._asked}

    def _likeliest(self, told: Mapping[str, Any], own: int) -> Likeliest:
        """One place in vLLM's form, ``{"token id": {"logprob": number, "rank": …}}``, the prompt's own token among it.

        Raises:
            UserError: another token stands there.
        """
        found = {int(token): float(entry["logprob"]) for token, entry in told.items()}
        if own not in found:
            raise UserError(
                f"teacher.server: {self.endpoint.url} has another token where {own} is expected; its tokenizer or chat "
                f"template is not that of teacher.path"
            )
        return found

    def _try(self) -> None:
        """Finds out before training whether the server does what is asked of it."""
        token = next(iter(self.end_tokens), 0)
        told = self.endpoint.ask("completions", self._request([token, token]), lambda r: r["choices"][0])
        entries = told.get("prompt_logprobs") if isinstance(told, dict) else None
        if not entries:
            raise UserError(
                f"teacher.server: {self.endpoint.url} tells no prompt_logprobs, which distillation learns from; "
                "serve the teacher with vLLM"
            )

    def _targets(self, found: Sequence[Likeliest], device: torch.device) -> TopKTargets:
        """Of as many tokens in every row: the places of a batch differ by the tokens that the student has not."""
        rows = []
        for likeliest in found:
            shared = {i: p for i, p in likeliest.items() if self._vocabulary is None or i < self._vocabulary}
            # As a head that is cut to the shared ids, whose softmax leaves the others out.
            others = sum(math.exp(p) for i, p in likeliest.items() if i not in shared)
            scale = math.log1p(-min(others, 1 - _LEAST_TAIL))
            ranked = sorted(shared.items(), key=lambda entry: -entry[1])[: self.top]
            rows.append([(i, p - scale) for i, p in ranked])
        k = min((len(row) for row in rows), default=self.top)
        ids = torch.tensor([[i for i, _ in row[:k]] for row in rows], dtype=torch.int64).reshape(len(rows), k)
        logprobs = torch.tensor([[p for _, p in row[:k]] for row in rows], dtype=torch.float64).reshape(len(rows), k)
        tail = (1 - logprobs.exp().sum(-1)).clamp(min=_LEAST_TAIL).log()
        if k == self._vocabulary:
            tail.fill_(-torch.inf)  # there is no other token, for the student neither
        return TopKTargets(ids.to(device), logprobs.float().to(device), tail.float().to(device))


def _image_part(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
