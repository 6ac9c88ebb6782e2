"""A model on an OpenAI-compatible server (vLLM): likeliest tokens at each position of an answer, and answers."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from PIL import Image

from data.batch import DistillationBatch
from data.conversation import Conversation
from data.errors import BadSample, UserError
from vlm_distill.endpoint import Endpoint, Refused, Unreachable
from vlm_distill.endpoint_pool import EndpointPool
from vlm_distill.losses import TokenTargets, TopKTargets

from .answers import Answer
from .chat import plain_messages
from .interface import VisionLanguageModel
from .pretrained_processor import PretrainedProcessor
from .processor import Processor, Prompt, template_ends
from .served_rows import OF_ONE, Row, ServedRows
from .teacher import TeacherOutputs
from .vocabulary import cut_head, separate_heads
from .weightless import needs_weights

KEY_VARIABLE = "OPENAI_API_KEY"
# A server computes in float32 at best: the probability beside its likeliest tokens is not known more exactly than this.
_LEAST_TAIL = 1e-7
# Numbers that sum to more than this are not probabilities; rounding in bfloat16 explains up to this much.
_MOST_MASS = 1.1
# Number of tokens with which a server's tokenizer is compared.
_TRIED = 48
# Overrides what vLLM would take from the model's own generation settings.
_PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

#: Log-probabilities by token at one position.
Likeliest = Mapping[int, float]


class ServedModel:
    """A model on a server; its processor runs here and must be the same as the server's.

    Text goes to ``/completions`` as token ids, so the server's tokenizer is not used. A conversation with images goes
    to ``/chat/completions``: the server renders it and expands the images itself.

    Args:
        processor: the model's processor, loaded here.
        endpoint: the server, or several servers of the same model.
        name: the model's name on the server.
        arguments: of its chat template, for conversations that the server renders.
        origin: the key of the configuration that names the model whose processor this is.
        pools: whether the server returns hidden states (vLLM's pooling runner) and generates nothing.

    Attributes:
        context: the most tokens of a request and its answer together; ``None`` if the server does not say.
        end_tokens: ids that end an answer.
        silent: addresses of servers that return no log-probabilities of the prompt.
        root: the same server without ``/v1``, where vLLM has the paths that OpenAI's API lacks.

    Raises:
        UserError: the server has no such model, its tokenizer differs, or no server can load the model.
    """

    def __init__(
        self,
        processor: Processor,
        endpoint: Endpoint | EndpointPool,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        origin: str = "teacher.path",
        pools: bool = False,
    ) -> None:
        self.processor, self.endpoint, self.name, self.pools = processor, endpoint, name, pools
        self.who, self.origin = endpoint.who, origin
        self.advice = f"start again when it does ({self.who}.timeout: seconds that a request may take)"
        self.root = endpoint.above("/v1")
        self.arguments = dict(arguments or {})
        if processor.has_vision and not isinstance(processor, PretrainedProcessor):
            raise UserError(
                f"{origin}: is assembled from parts, which no server loads; vlm-distill export --format llava turns "
                "it into a model that servers load"
            )
        eos = processor.tokenizer.eos_token_id
        self.end_tokens = template_ends(processor) | (set() if eos is None else {eos})
        self.context: int | None = None
        self.silent: list[str] = []
        self._compare_with_servers()

    @property
    def tells(self) -> bool:
        """Return whether log-probabilities of the prompt are returned."""
        return not (self.pools or self.silent)

    @needs_weights
    def _compare_with_servers(self) -> None:
        self.endpoint.check_each(self._compare_with)

    def _compare_with(self, server: Endpoint) -> None:
        """Raise ``UserError`` if a server has no such model, or another tokenizer."""
        contexts = server.ask("models", None, _read_contexts, self.advice)
        if self.name not in contexts:
            served = ", ".join(contexts) or "nothing"
            raise UserError(f"{self.who}.model: {server.url} serves {served[:300]}, not {self.name}")
        known = [length for length in (self.context, contexts[self.name]) if length is not None]
        self.context = min(known, default=None)
        if self.pools:
            self._compare_tokens(server)
        elif not self._compare_tokenizers(server) and server.url not in self.silent:
            self.silent.append(server.url)

    def text(self, ids: Sequence[int], **settings: Any) -> tuple[str, dict[str, Any]]:
        """Return path and body of a request for a text."""
        return "completions", {"model": self.name, "prompt": list(ids), **_PLAIN, **settings}

    def chat(
        self, conversation: Conversation, images: Sequence[Image.Image], *, generation: bool, **settings: Any
    ) -> tuple[str, dict[str, Any]]:
        """Return path and body of a request for a conversation with images."""
        body = self.rendering(conversation, images, generation=generation)
        return "chat/completions", {**body, **_PLAIN, **settings}

    def rendering(
        self, conversation: Conversation, images: Sequence[Image.Image], *, generation: bool
    ) -> dict[str, Any]:
        """Return the part of a request that lets the server render a conversation as it is rendered here."""
        remaining = iter(images)

        def part(own: Mapping[str, Any]) -> dict[str, Any]:
            return {"type": "text", "text": own["text"]} if own["type"] == "text" else _image_part(next(remaining))

        messages = []
        for message in plain_messages(conversation.messages):
            messages.append({**message, "content": [part(own) for own in message["content"]]})
        assert isinstance(self.processor, PretrainedProcessor)
        special = self.processor.adds_special_tokens(conversation)
        body: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "add_generation_prompt": generation,
            "add_special_tokens": special,
        }
        if conversation.tools:
            body["tools"] = [*conversation.tools]
        if self.arguments:
            body["chat_template_kwargs"] = self.arguments
        return body

    def differs(self, ids: Sequence[int]) -> UserError:
        """Return the error for a server with other tokens than these."""
        words = self.processor.tokenizer.convert_ids_to_tokens(list(ids))
        return UserError(
            f"{self.who}: {self.endpoint.url} has other tokens where {' '.join(words)!r} is expected; its tokenizer or "
            f"chat template is not that of {self.origin}"
        )

    def check_ends(self, ids: Sequence[int], there: Sequence[int], before: range, after: range) -> None:
        """Raise ``UserError`` if a prompt has other tokens on the server before its first image or after its last.

        Args:
            ids: here.
            there: on the server, where images may take another number of tokens.
            before: positions before the first image.
            after: positions after the last image, counted from the end and so below 0.
        """
        if len(there) < len(before) + len(after):
            raise self.differs(ids[after.start :])
        for position in (*before, *after):
            if there[position] != ids[position]:
                raise self.differs(ids[position : position + 1])

    def _compare_tokenizers(self, server: Endpoint) -> bool:
        """Return whether a server reports the tokens of a text. Raise ``UserError`` if they differ from ours."""
        text, ids = self._trial()
        body = {"model": self.name, "prompt": text, "add_special_tokens": False, "max_tokens": 1, "prompt_logprobs": 1}

        def read(reply: Any) -> bool:
            told = reply["choices"][0].get("prompt_logprobs")
            if not told:
                return False
            if len(told) != len(ids) or any(str(own) not in seen for own, seen in zip(ids[1:], told[1:], strict=True)):
                raise self.differs(ids[:4])
            return True

        try:
            return server.ask("completions", body, read, self.advice)
        except Refused as refused:
            if refused.status != 404:
                raise
            raise UserError(
                f"{self.who}: {server.url} generates nothing ({refused.detail}); start vLLM without --runner "
                "pooling (that is for teacher.server.form: hidden)"
            ) from None

    def _compare_tokens(self, server: Endpoint) -> None:
        """Raise ``UserError`` if a server that generates nothing has other tokens for a text than are here."""
        text, ids = self._trial()
        body = {"model": self.name, "prompt": text, "add_special_tokens": False}
        there = server.above("/v1").ask("tokenize", body, read_tokens, self.advice)
        if there != ids:
            raise self.differs(ids[:4])

    def _trial(self) -> tuple[str, list[int]]:
        """Return a text of many of the tokenizer's words, and its tokens."""
        tokenizer = self.processor.tokenizer
        step = max(1, len(tokenizer) // _TRIED)
        words = (tokenizer.decode([i]).strip() for i in range(0, len(tokenizer), step))
        text = " ".join(["It is 12:30.", *(word for word in words if word.isalnum())])
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]


class ServedTeacher(ServedRows[list[Likeliest]]):
    """Scores prompts that contain the answers, by ``prompt_logprobs``, which vLLM serves since version 0.6.

    In conversations with images, positions are counted from the end, since the server may expand images differently.
    The tokens before the first image and after the last must be the same as here. Where only the log-probabilities of
    the answers' own tokens are needed, a server without ``prompt_logprobs`` is asked to repeat the prompt (``echo``).

    Args:
        served: the teacher.
        top: how many of the likeliest tokens to request; 0: only the answers' own log-probabilities. vLLM gives at
            most 20 unless started with ``--max-logprobs``.
        workers: this rank's concurrent requests.

    Raises:
        UserError: the server does not return that many log-probabilities of the prompt.
    """

    likeliest: int

    def __init__(self, served: ServedModel, top: int, workers: int) -> None:
        super().__init__(served.processor, workers)
        self.served, self.likeliest = served, top
        self._vocabulary: int | None = None
        self._try()

    @property
    def end_tokens(self) -> set[int]:
        return self.served.end_tokens

    def align(self, student: VisionLanguageModel) -> int:
        """Cut the student's head and the server's replies to the tokens that both share, and return their number."""
        self._vocabulary = cut_head(student, self.processor.tokenizer)
        return self._vocabulary

    def separate(self, student: VisionLanguageModel) -> None:
        assert self.likeliest == 0
        separate_heads(student)

    def limit(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    @torch.no_grad()
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        assert not features
        found = list(chain.from_iterable(self.replies(batch)))
        if self.likeliest == 0:
            own = [told[token] for told, token in zip(found, batch.teacher_targets.tolist(), strict=True)]
            return TeacherOutputs(TokenTargets(torch.tensor(own, device=batch.targets.device)))
        return TeacherOutputs(self._targets(found, batch.targets.device))

    def ask(self, row: Row) -> list[Likeliest]:
        supervised = [position + 1 for position in row.predicting]
        if row.conversation is None:
            return self._score(row.ids, supervised)
        return self._score_seen(row.conversation, row, supervised)

    def _score(
        self, ids: list[int], positions: Sequence[int], server: Endpoint | EndpointPool | None = None
    ) -> list[Likeliest]:
        """Return the likeliest tokens at some positions of a text, by default from any of the servers."""
        server = server or self.served.endpoint

        def read(reply: Any) -> list[Likeliest]:
            told = reply["choices"][0]["prompt_logprobs"]
            if len(told) != len(ids):
                raise ValueError(f"{len(told)} positions for a prompt of {len(ids)} tokens")
            return [self._likeliest(told[position], ids[position]) for position in positions]

        if not self.served.tells:
            return self._score_repeated(ids, positions, server)
        path, body = self.served.text(ids, **self._asked)
        return server.ask(path, body, read, self.served.advice)

    def _score_repeated(
        self, ids: list[int], positions: Sequence[int], server: Endpoint | EndpointPool
    ) -> list[Likeliest]:
        """Return the log-probabilities of the own tokens at some positions of a text that the server repeats."""

        def read(reply: Any) -> list[Likeliest]:
            told = reply["choices"][0]["logprobs"]["token_logprobs"]
            if len(told) not in (len(ids), len(ids) + 1):  # some servers generate a token all the same
                raise ValueError(f"{len(told)} positions for a prompt of {len(ids)} tokens")
            own = {position: float(told[position]) for position in positions}
            return [self._checked({ids[position]: value}) for position, value in own.items()]

        path, body = self.served.text(ids, max_tokens=1, echo=True, logprobs=1, temperature=1.0)
        return server.ask(path, body, read, self.served.advice)

    def _score_seen(self, conversation: Conversation, row: Row, positions: Sequence[int]) -> list[Likeliest]:
        """Return the same for a conversation with images."""
        ids = row.ids
        before, after = row.around_images

        def read(reply: Any) -> list[Likeliest]:
            told, there = reply["prompt_logprobs"], reply.get("prompt_token_ids")
            if there:
                self.served.check_ends(ids, there, before, after)
            elif len(told) < len(before) + len(after):
                raise self.served.differs(ids[after.start :])
            else:
                # vLLM returns the prompt's ids since 0.10.2; before, a token is among its position's likeliest.
                for position in (*before, *after):
                    if told[position] is not None and str(ids[position]) not in told[position]:
                        raise self.served.differs(ids[position : position + 1])
            return [self._likeliest(told[position - len(ids)], ids[position]) for position in positions]

        settings = {"generation": False, "return_token_ids": True, **self._asked}
        path, body = self.served.chat(conversation, row.images, **settings)
        return self.served.endpoint.ask(path, body, read, self.served.advice)

    @property
    def _asked(self) -> dict[str, Any]:
        # Servers refuse to generate no token, so one is generated and ignored. Before its version 1 engine, vLLM
        # divided the prompt's log-probabilities by the temperature, too.
        return {"max_tokens": 1, "prompt_logprobs": max(1, self.likeliest), "temperature": 1.0}

    def _likeliest(self, told: Mapping[str, Any] | None, own: int) -> Likeliest:
        """Read one position: vLLM's ``{"token id": {"logprob": number, "rank": …}}``, the prompt's token included.

        Raises:
            UserError: the token at this position is another, or the numbers are not log-probabilities.
        """
        if told is None:
            raise ValueError("a position without log-probabilities")
        found = {int(token): float(entry["logprob"]) for token, entry in told.items()}
        if own not in found:
            raise self.served.differs([own])
        return self._checked(found)

    def _checked(self, found: Likeliest) -> Likeliest:
        """Return log-probabilities at a position. Raise ``UserError`` if they are none."""
        if not sum(math.exp(min(p, 1.0)) for p in found.values()) < _MOST_MASS:
            raise UserError(
                f"teacher.server: {self.served.endpoint.url} returns numbers that are not log-probabilities; start "
                "vLLM with --logprobs-mode raw_logprobs"
            )
        return found

    @needs_weights
    def _try(self) -> None:
        """Find out before training whether each server returns enough log-probabilities."""
        self.served.endpoint.check_each(self._try_server)

    def _try_server(self, server: Endpoint) -> None:
        token, url = next(iter(self.end_tokens), 0), server.url
        if not self.served.tells and (self.likeliest or self.needs_images):
            raise UserError(
                f"teacher.server: {self.served.silent[0]} returns no prompt_logprobs, which distillation needs; "
                "serve the teacher with vLLM"
            )
        try:
            self._score([token, token], [1], server)
        except UserError as error:
            if self.served.tells or isinstance(error, Unreachable):
                raise
            raise UserError(
                f"teacher.server: {url} returns neither prompt_logprobs nor the log-probabilities of a text that it "
                f"repeats (echo); serve the teacher with vLLM ({error})"
            ) from None

    def _targets(self, found: Sequence[Likeliest], device: torch.device) -> TopKTargets:
        """Make targets with the same number of tokens a row; rows differ by the tokens that the student lacks."""
        rows: list[list[tuple[int, float]]] = []
        for likeliest in found:
            shared = {i: p for i, p in likeliest.items() if self._vocabulary is None or i < self._vocabulary}
            # Renormalise, like the softmax of a head that is cut to the shared ids.
            others = sum(math.exp(p) for i, p in likeliest.items() if i not in shared)
            scale = math.log1p(-min(others, 1 - _LEAST_TAIL))
            ranked = sorted(shared.items(), key=lambda entry: -entry[1])[: self.likeliest]
            rows.append([(i, p - scale) for i, p in ranked])
        k = min((len(row) for row in rows), default=self.likeliest)
        kept = list(chain.from_iterable(row[:k] for row in rows))
        ids = torch.tensor([i for i, _ in kept], dtype=torch.int64).reshape(len(rows), k)
        logprobs = torch.tensor([p for _, p in kept], dtype=torch.float64).reshape(len(rows), k)
        tail = (1 - logprobs.exp().sum(-1)).clamp(min=_LEAST_TAIL).log()
        if k == self._vocabulary:
            tail.fill_(-torch.inf)  # the student has no other token either
        return TopKTargets(ids.to(device), logprobs.float().to(device), tail.float().to(device))


class ServedAnswers:
    """Asks a model on a server, one request a question.

    Args:
        served: the model.
        temperature: at which answers are drawn; 0: the likeliest tokens.
        key: seeds the answers, together with each question's source and line. A server may ignore the seed.
    """

    def __init__(self, served: ServedModel, temperature: float, key: str) -> None:
        self.served, self.processor, self.temperature, self.key = served, served.processor, temperature, key

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Answer | BadSample]:
        """Return an answer to each question, or why there is none: the model or the server refuses this question.

        Answers have neither token ids nor log-probabilities. They are complete if the server stopped by itself.

        Raises:
            UserError: the server cannot be reached, or refuses for a reason other than the question.
        """
        return [self._answer(*prompt, max_new_tokens) for prompt in prompts]

    def _answer(self, conversation: Conversation, images: Sequence[Image.Image], longest: int) -> Answer | BadSample:
        prompt = conversation.prompt()
        shown = images[: len(prompt.images)]
        settings: dict[str, Any] = {"max_tokens": longest, "temperature": self.temperature}
        # The same end tokens as for a model here; vLLM adds those of the model's own generation settings.
        settings["stop_token_ids"] = sorted(self.served.end_tokens)
        if self.temperature:
            seed = f"{self.key} {prompt.source} {prompt.line}"
            settings["seed"] = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4])
        try:
            # Also with images: the server gets nothing that a model here would refuse, such as a control token.
            ids = self.processor.encode(prompt, shown, generation=True).input_ids.tolist()
            if shown:
                path, body = self.served.chat(prompt, shown, generation=True, **settings)
            else:
                path, body = self.served.text(ids, **settings)
            return self.served.endpoint.ask(path, body, _read_answer, self.served.advice)
        except BadSample as bad:
            return bad
        except Refused as refused:
            if refused.status == 500:
                # Still after all retries. If the server is well otherwise, this question makes it fail.
                self._probe()
                return BadSample("server fails", refused.detail)
            if refused.status in OF_ONE:
                return BadSample("server refuses the question", refused.detail)
            raise

    def _probe(self) -> None:
        path, body = self.served.text(sorted(self.served.end_tokens)[:1] or [0], max_tokens=1, temperature=0.0)
        self.served.endpoint.ask(path, body, lambda reply: reply["choices"][0], self.served.advice)


def _read_contexts(reply: Any) -> dict[str, int | None]:
    """Return the context length of each model that a server lists; ``None`` if it does not say."""
    contexts = {}
    for card in reply["data"]:
        length = card.get("max_model_len")
        contexts[str(card["id"])] = None if length is None else int(length)
    return contexts


def read_tokens(reply: Any) -> list[int]:
    """Return the tokens that vLLM's ``/tokenize`` reports."""
    return [int(token) for token in reply["tokens"]]


def _read_answer(reply: Any) -> Answer:
    choice = reply["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Answer((text or "").strip(), [], [], choice["finish_reason"] == "stop")


def _image_part(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
