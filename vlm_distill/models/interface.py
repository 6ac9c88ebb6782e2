"""What a teacher or a student is to the rest of the suite: one interface over assembled and pretrained models."""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from data.batch import Encoded, ModelInputs
from data.conversation import Conversation, Document, count_images
from data.errors import BadSample

from .adapters import with_adapters
from .chat import Frame, probe_frame, special_ids, with_arguments
from .packing import join, keeps_apart
from .thinking import decode_with_marks, mark_tokens, opening_mark

Prompt = tuple[Conversation, Sequence[Image.Image]]


@dataclass
class Outputs:
    """What a forward gives.

    Attributes:
        hidden: ``[N, H]``, the decoder's last hidden states (after its final norm) at the asked positions.
        features: further activations that were asked for, by the names of :meth:`VisionLanguageModel.forward`.
    """

    hidden: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Answer:
    """A model's answer.

    Attributes:
        text: without special tokens.
        token_ids, logprobs: with the end token; log-probabilities in nats.
        complete: false where the answer was cut at the longest that was allowed, so that it has no end token.
        marked: the text with the marks around thoughts, where ``text`` lacks them: those that are special tokens, and
            the one that the chat template's opening ends with (``<think>``). ``None`` where it equals ``text``.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    complete: bool = True
    marked: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, each from random numbers of its own: it depends on no other answer beside it.

    Attributes:
        temperature: the logits are divided by it; at 0 the likeliest of the tokens that may be drawn are taken.
        generators: one for each prompt. An answer takes a number for each of its tokens.
    """

    temperature: float
    generators: Sequence[random.Random]


class LMHead:
    """Reads a decoder's output layer without owning it: ``softcap(scale · (h Wᵀ + b))`` with softcap(z) = c·tanh(z/c).

    Args:
        linear: the output layer; its parameters stay registered where they are (they may be tied to the embedding).
            With LoRA on it (peft), the weight is that of the layer plus its active adapters' products.
        scale: factor on the logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: c, or ``None`` for no cap (Gemma 2's ``final_logit_softcapping``).

    ``vocabulary`` restricts the head to its first ids; ``gather`` makes parameters whole where they are sharded and is
    installed by the training engine.
    """

    def __init__(self, linear: nn.Linear, scale: float = 1.0, softcap: float | None = None) -> None:
        self._linear = linear
        self.scale = scale
        self.softcap = softcap
        self.vocabulary: int | None = None
        self.gather: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = lambda parameters: nullcontext()
        self._adapters = True

    def rebind(self, linear: nn.Linear) -> None:
        """Reads this layer from now on: the output layer with adapters around it, or without them again."""
        self._linear = linear

    def without_adapters(self) -> LMHead:
        """The same head with the adapters on its layer left out."""
        plain = copy.copy(self)
        plain._adapters = False
        return plain

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What :meth:`weight` and :attr:`bias` read."""
        return list(self._linear.parameters())

    @contextmanager
    def weight(self) -> Iterator[Tensor]:
        """The weight ``[V, H]``, whole and cut to the shared vocabulary; inside, :attr:`bias` may be read."""
        with self.gather(self.parameters):
            weight = with_adapters(self._linear) if self._adapters else self._linear.weight
            yield weight[: self.vocabulary]

    @property
    def bias(self) -> Tensor | None:
        """``[V]`` or ``None``; to be read inside :meth:`weight`."""
        return None if self._linear.bias is None else self._linear.bias[: self.vocabulary]

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[N, V]`` of ``hidden [N, H]``: the definition that the chunked losses are held to."""
        with self.weight() as weight:
            return self.logits_with(hidden, weight)

    def logprobs(self, hidden: Tensor, targets: Tensor, rows: int = 256) -> Tensor:
        """Log-probabilities ``[N]`` of the tokens ``targets [N]``, from logits of so many rows at a time."""
        found = [hidden.new_zeros(0, dtype=torch.float32)]
        with self.weight() as weight:
            for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
                logits = self.logits_with(part, weight)
                found.append(logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1))
        return torch.cat(found)

    def logits_with(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The same with the weight that :meth:`weight` has given, for what makes them part by part."""
        logits = hidden.float() @ weight.float().T
        if self.bias is not None:
            logits = logits + self.bias.float()
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _last_answer(row: Encoded) -> Tensor:
    """Places of the tokens of a sample's last answer, its end tokens left out."""
    tokens = (row.supervised & ~row.ends).nonzero().flatten()
    if not len(tokens):
        raise BadSample("empty answer", "the chat template renders it as nothing")
    gaps = (tokens.diff() > 1).nonzero()
    return tokens[int(gaps[-1]) + 1 :] if len(gaps) else tokens


class Processor(ABC):
    """Turns conversations into one model's inputs and marks the supervised tokens."""

    tokenizer: Any
    has_vision: bool
    #: What is known of images without their pixels; see :meth:`with_features`.
    features: Callable[[Sequence[Image.Image]], Tensor] | None = None
    #: Whether the model wants all samples that share a row in one; the model sets it.
    one_row: bool = False
    #: Whether what the chat template writes before a plain answer is supervised (``data.template_text: learn``).
    learn_block: bool = False
    _frame: Frame | None = None
    _framed: Any = None

    @property
    @abstractmethod
    def chat_template(self) -> Any:
        """The Jinja template of conversations; ``None`` where there is no chat."""

    @abstractmethod
    def set_chat_template(self, template: Any) -> None:
        """Take another template, in this processor alone."""

    @abstractmethod
    def _render(
        self, messages: Sequence[dict[str, Any]], generation: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Return a conversation as text; the only place where a chat template is run."""

    def set_template_arguments(self, arguments: Mapping[str, Any], where: str) -> None:
        """Give the chat template these arguments from now on; raises as :func:`~.chat.with_arguments`."""
        if arguments:
            self.set_chat_template(with_arguments(self.chat_template, arguments, where))

    @property
    def frame(self) -> Frame:
        """What the chat template writes around messages. It is probed once, and again when the template changes."""
        if self._frame is None or self._framed != self.chat_template:
            self._framed, self._frame = self.chat_template, None
            self._frame = probe_frame(self.tokenizer, self._render)
        return self._frame

    @abstractmethod
    def encode(self, conversation: Conversation, images: Sequence[Image.Image], *, generation: bool = False) -> Encoded:
        """Token ids with the supervised ones marked.

        Args:
            conversation: ends with an assistant message, or with a user message when ``generation`` is set.
            images: RGB, one for each image part.
            generation: end with the template's opening of the assistant's turn; nothing is supervised.

        Raises:
            BadSample: the chat template or the model cannot take this conversation.
        """

    def encode_document(self, document: Document) -> Encoded:
        """A document's tokens with what the tokenizer puts around a text, and its end token where it ends.

        All but the first are supervised. ``supervised`` and ``ends`` are as in :class:`~data.batch.Encoded`.
        """
        # Its length is nobody's mistake, and an end token that is written out in it is text.
        ids = list(self.tokenizer(document.text, verbose=False, split_special_tokens=True)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if document.last and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        input_ids = torch.tensor(ids, dtype=torch.long)
        ends = torch.zeros(len(ids), dtype=torch.bool)
        if document.last and eos is not None:
            ends[-1] = True
        return Encoded(input_ids, torch.arange(len(ids)) > 0, ends)

    def answered(self, prompt: Encoded, ids: Sequence[int]) -> Encoded:
        """A prompt that was encoded for generation with an answer's tokens after it, all of them supervised."""
        length, new = len(prompt.input_ids), len(ids)
        tensors = dict(prompt.tensors)
        for name, tensor in tensors.items():
            if tensor.shape in ((length,), (1, length)):  # one value a token; zero is text, but for the mask of padding
                rest = tensor.new_full((*tensor.shape[:-1], new), int(name == "attention_mask"))
                tensors[name] = torch.cat([tensor, rest], -1)
        input_ids = torch.cat([prompt.input_ids, torch.tensor(ids, dtype=torch.long)])
        supervised = torch.arange(length + new) >= length
        return Encoded(input_ids, supervised, torch.zeros_like(supervised), prompt.images, tensors)

    @abstractmethod
    def pictured(self, images: Sequence[Image.Image]) -> Encoded:
        """A row with these images, of which there is at least one, and nothing supervised."""

    @abstractmethod
    def blank(self) -> Image.Image:
        """The image of a dummy row."""

    @abstractmethod
    def dummy(self) -> Encoded:
        """A row with one blank image (no image for a text model) and no supervised token."""

    def seen_together(self, images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
        """A sample's images in the groups within which what is seen of one may depend on the others."""
        return [images] if images else []

    def with_features(self, features: Callable[[Sequence[Image.Image]], Tensor]) -> Self:
        """The same processor, which gives what :meth:`VisionLanguageModel.see` made of images in place of pixels.

        Args:
            features: of a group that :meth:`seen_together` makes, ``[tokens, C]``.
        """
        other = copy.copy(self)
        other.features = features
        return other

    @abstractmethod
    def collate(self, samples: Sequence[Encoded], *, padding_side: str = "right") -> ModelInputs:
        """Samples padded into one batch; ``input_ids`` and ``attention_mask`` are ``[B, L]``.

        Where samples were joined there is no ``attention_mask``: ``position_ids`` ``[B, L]`` or ``[4, B, L]`` start
        again with each of them, and padding is one more sample.
        """

    def join(self, samples: Sequence[Encoded]) -> Encoded:
        """Samples in one row, told apart by positions that start again: see :mod:`.packing`."""
        return join(samples, [self.positions(sample) for sample in samples])

    def positions(self, sample: Encoded) -> Tensor:
        """``position_ids`` of a sample's tokens, ``[L]``, or ``[4, L]`` for M-RoPE: of text, time, height and width."""
        return torch.arange(len(sample.input_ids))

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer and image processing beside the model's weights."""

    @abstractmethod
    def image_tokens(self, sample: Encoded) -> Tensor:
        """Bool ``[L]``: which tokens of an encoded sample stand for images."""


class _Choice(LogitsProcessor):
    """Chooses each token, the likeliest or a drawn one, and records its log-probability; keeps no logits.

    A token is drawn by inverting the cumulative distribution at one uniform number. Generation stays greedy and finds
    only that token possible: no random state of the process, nor the rows beside it, has a part in the choice.

    Args:
        sampling: ``None`` for the likeliest tokens.
        vocabulary: ids from here on are never drawn; ``None``: all may be.
        barred: further ids that are not.
    """

    def __init__(self, sampling: Sampling | None, vocabulary: int | None, barred: set[int]) -> None:
        self.sampling, self.vocabulary, self.barred = sampling, vocabulary, barred
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.sampling is None:
            self.columns.append(scores.max(-1).values - scores.logsumexp(-1))
            return scores
        chosen = self._drawn(scores, self.sampling)
        self.columns.append(scores.gather(-1, chosen).squeeze(-1) - scores.logsumexp(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def _drawn(self, scores: Tensor, sampling: Sampling) -> Tensor:
        """One id a row, ``[B, 1]``."""
        # In float64: a sum of so many small numbers is rounded too much otherwise.
        logits = scores.double()
        if self.vocabulary is not None:
            logits[:, self.vocabulary :] = -torch.inf
        logits[:, [token for token in self.barred if token < logits.shape[-1]]] = -torch.inf
        if not sampling.temperature:
            return logits.argmax(-1, keepdim=True)
        numbers = [generator.random() for generator in sampling.generators]
        numbers += [0.5] * (len(scores) - len(numbers))  # a dummy row
        total = (logits / sampling.temperature).softmax(-1).cumsum(-1)
        mark = torch.tensor(numbers, dtype=total.dtype, device=total.device).unsqueeze(-1) * total[:, -1:]
        return (total <= mark).sum(-1, keepdim=True).clamp_(max=total.shape[-1] - 1)


class VisionLanguageModel(nn.Module, ABC):
    """Vision encoder, projector and decoder behind one interface; without the first two, a language model.

    Attributes:
        vision_encoder, projector: ``None`` for a language model.
        decoder: the language model, its output layer included.
        head: the output layer as the losses read it.
        processor: conversations to inputs.
        synced: set by the engine when ranks must leave ``generate`` together (parameters sharded over ranks).
    """

    processor: Processor
    head: LMHead
    synced: bool = False

    @property
    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """``vision_encoder``, ``projector`` and ``decoder``, those that there are."""

    @property
    @abstractmethod
    def body(self) -> nn.Module:
        """The decoder without its output layer: what takes embeddings and gives hidden states."""

    @abstractmethod
    def forward(self, inputs: ModelInputs, positions: Tensor, features: Sequence[str] = ()) -> Outputs:
        """Hidden states, never logits.

        Args:
            inputs: from ``processor.collate``, on this model's device.
            positions: int64 ``[N]``, indices into the flattened ``[B·L]`` of the sequence.
            features: names of further activations to return. Nothing is kept of those not asked for.

                - ``hidden.K``: ``[N, H]``, hidden states at ``positions``. 0 is the embeddings with the images', K the
                  K-th layer's output; the last, which is also −1, is after the final norm: ``Outputs.hidden`` itself.
                - ``vision``: ``[images, tokens, C]``, what the vision encoder gives to the projector.
                - ``projector``: ``[images, tokens, H]``, what the projector gives to the decoder.
                - ``sight``: what may stand in the images' place as ``vision_features``; see :attr:`sight`.
                - ``queries``, ``keys``, ``values``: ``[N, heads · head width]``, the outputs of the projections in the
                  last layer's attention at ``positions``, before rotary positions and norms of single heads; where
                  several queries share a key, keys and values have fewer heads.

                Those of images are there when the batch has an image, dummy rows' images among them.

        Raises:
            UserError: there is no such feature, or this model cannot give it.
        """

    @abstractmethod
    def feature_shape(self, name: str) -> tuple[int | None, int]:
        """A feature's number of tokens an image (``None``: not one of images, or known by running alone) and its width.

        Raises:
            UserError: as in :meth:`forward`.
        """

    @abstractmethod
    def vision_positions(self, inputs: ModelInputs) -> dict[str, float]:
        """At how many positions ``vision_encoder`` and ``projector`` compute for a batch, to count their operations.

        Those of an encoder are patches with class tokens, those of a projector what it makes of them. 0 for what does
        not run, and for an encoder whose layers differ in theirs, as a convolutional one's do.
        """

    @property
    @abstractmethod
    def sight(self) -> dict[str, nn.Module]:
        """The parts that make of images what may stand in their place among the inputs, as ``vision_features``.

        Raises:
            UserError: this model sees no images, or takes nothing in their place.
        """

    @property
    @abstractmethod
    def sight_settings(self) -> dict[str, Any]:
        """What decides, beside the weights of :attr:`sight`, what an image becomes."""

    @abstractmethod
    def encode_images(self, rows: Sequence[Encoded]) -> list[Tensor]:
        """What :attr:`sight` makes of each row's images, ``[tokens, C]``.

        Args:
            rows: each with at least one image.
        """

    @abstractmethod
    def _generate(self, inputs: ModelInputs, **settings: Any) -> Tensor:
        """New token ids ``[B, T]`` only, for left-padded inputs."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes configuration, safetensors and processor; ``load_vlm`` reads them back bit for bit.

        Args:
            folder: made if need be.
            state: the weights to write, where the model's own are sharded over ranks.
        """

    def keeps_samples_apart(self) -> bool:
        """Whether samples in one row, told by positions that start again, see nothing of each other."""
        return keeps_apart(self)

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """Recompute the decoder's and the vision encoder's layers in the backward instead of keeping them."""

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64) -> list[Answer]:
        """Greedy answers to conversations that end with a user message.

        Args:
            prompts: conversations (an assistant message at their end is left out) with all of their images.
            max_new_tokens: longest answer.
        """
        return self.answer([self.encode_prompt(*prompt) for prompt in prompts], max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def answer(
        self, rows: Sequence[Encoded], *, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> list[Answer]:
        """Answers to encoded prompts.

        Drawn answers hold no special tokens but end tokens (an image token in an answer would be one without an image),
        and none beyond the vocabulary that the head is cut to.

        Args:
            rows: from :meth:`encode_prompt`. Where ranks leave ``generate`` together, there may be none on some.
            max_new_tokens: longest answer.
            sampling: how to draw; ``None``: greedy.
        """
        encoded = list(rows)
        if self.synced and (not encoded or (self.processor.has_vision and not any(row.images for row in encoded))):
            # Sharded parameters are gathered by all ranks together: every part must run here as it does there.
            encoded.append(self.processor.dummy())
        if not encoded:
            return []
        parameter = next(self.parameters())
        inputs = self.processor.collate(encoded, padding_side="left").to(parameter.device, self.dtype)
        choice = _Choice(sampling, self.head.vocabulary, special_ids(self.processor.tokenizer) - self.end_tokens)
        training = self.training
        self.eval()
        try:
            new = self._generate(
                inputs,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,  # some models' own generation settings would distort the choice
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(self.end_tokens),
                pad_token_id=self.pad_token,
                logits_processor=LogitsProcessorList([choice]),
                synced_gpus=self.synced,
            )
        finally:
            self.train(training)
        steps = min(new.shape[1], len(choice.columns))
        logprobs = torch.stack(choice.columns[:steps], 1).tolist() if steps else [[] for _ in encoded]
        openings = [opening_mark(self.processor.tokenizer, row.input_ids.tolist()) for row in rows]
        marks = mark_tokens(self.processor.tokenizer)
        found = zip(new.tolist(), logprobs, openings, strict=False)  # a dummy row at the end has no opening
        return [self._answer(ids[:steps], row, opening, marks) for ids, row, opening in found]

    @torch.no_grad()
    def score_options(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]:
        """Log-likelihoods in nats of given answers: the sum over an answer's tokens, its end token left out.

        One forward for all of them together.

        Args:
            prompts: as in :meth:`generate`.
            options: the answers to each prompt, at least one.

        Raises:
            BadSample: the chat template renders an answer as nothing, or not as it is.
        """
        rows, answers = [], []
        for (conversation, images), texts in zip(prompts, options, strict=True):
            prompt = conversation.prompt()
            for text in texts:
                message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
                answered = replace(prompt, messages=(*prompt.messages, message))
                row = self.processor.encode(answered, images[: count_images(prompt.messages)])
                rows.append(row)
                answers.append(_last_answer(row))
        count = len(rows)
        if self.processor.has_vision and not any(row.images for row in rows) and self.synced:
            rows.append(self.processor.dummy())
        inputs = self.processor.collate(rows)
        length = inputs["input_ids"].shape[1]
        places = torch.cat([row * length + tokens for row, tokens in enumerate(answers)])
        targets = inputs["input_ids"].flatten()[places]
        device = next(self.parameters()).device
        training = self.training
        self.eval()
        try:
            hidden = self(inputs.to(device, self.dtype), (places - 1).to(device)).hidden
        finally:
            self.train(training)
        logprobs = self.head.logprobs(hidden, targets.to(device)).cpu()
        scores = iter([part.sum().item() for part in logprobs.split([len(tokens) for tokens in answers])][:count])
        return [[next(scores) for _ in texts] for texts in options]

    def encode_prompt(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        """A conversation for the model to answer; an assistant message at its end is left out."""
        # Only an answer at the very end is left out: after a question the earlier answers are its history.
        if conversation.messages[-1]["role"] == "assistant":
            conversation = conversation.prompt()
        return self.processor.encode(conversation, images[: count_images(conversation.messages)], generation=True)

    def _answer(self, ids: list[int], logprobs: list[float], opening: str, marks: Mapping[int, str]) -> Answer:
        tokenizer = self.processor.tokenizer
        length = next((i + 1 for i, token in enumerate(ids) if token in self.end_tokens), len(ids))
        ids = ids[:length]
        complete = bool(ids) and ids[-1] in self.end_tokens
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        marked = None
        if opening or not marks.keys().isdisjoint(ids):
            marked = opening + decode_with_marks(tokenizer, ids, marks).strip()
        return Answer(text, ids, logprobs[:length], complete, marked)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def end_tokens(self) -> set[int]:
        """Ids that end an answer."""
        eos = self.processor.tokenizer.eos_token_id
        return set() if eos is None else {eos}

    @property
    def pad_token(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def train(self, mode: bool = True) -> Self:
        """As in torch, but that a frozen vision encoder says the same of an image in training as elsewhere."""
        super().train(mode)
        encoder = self.parts.get("vision_encoder")
        if encoder is not None and not any(p.requires_grad for p in encoder.parameters()):
            encoder.eval()
        return self

    def set_trainable(self, parts: Iterable[str]) -> None:
        """Trains the named parts and freezes the others."""
        chosen = set(parts)
        for name, part in self.parts.items():
            part.requires_grad_(name in chosen)
