"""Processor: turns conversations into one model's inputs and marks the supervised tokens."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from data.attempts import attempt
from data.batch import Encoded, ModelInputs
from data.conversation import Conversation, Document
from data.errors import BadSample, UserError

from .packed_rows import join
from .template_arguments import with_arguments
from .template_frame import Frame, probe_frame

Prompt = tuple[Conversation, Sequence[Image.Image]]


class Processor(ABC):
    """Turns conversations into one model's inputs and marks the supervised tokens.

    In a run: :meth:`encode` (or :meth:`encode_document`) for each sample, :meth:`join` for samples that share a row,
    and :meth:`collate` for a micro-batch. For generation: :meth:`encode` with ``generation``, then :meth:`collate`.
    """

    tokenizer: Any
    has_vision: bool
    #: Gives image features in place of pixels; see :meth:`with_features`.
    features: Callable[[Sequence[Image.Image]], Tensor] | None = None
    #: Whether the model can pack samples into a single row only, not into a batch of rows; the model sets it.
    one_row: bool = False
    #: The most frames of a video, if videos go in as such where the family takes them (``data.video``).
    video_frames: int | None = None
    #: Whether the model has an input of its own for videos, and receives it.
    takes_videos: bool = False
    #: Whether what the chat template writes before a plain answer is supervised (``data.template_text: learn``).
    learn_answer_prefix: bool = False
    _frame: Frame | None = None
    _framed: Any = None

    @property
    @abstractmethod
    def chat_template(self) -> Any:
        """The Jinja template of conversations; ``None`` for a model without chat."""

    @abstractmethod
    def set_chat_template(self, template: Any) -> None:
        """Replace the template, in this processor alone."""

    @abstractmethod
    def _render(
        self, messages: Sequence[dict[str, Any]], generation: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Render a conversation to text. Nothing else runs the chat template."""

    def set_template_arguments(self, arguments: Mapping[str, Any], where: str) -> None:
        """Fix these arguments of the chat template; raises as :func:`~.template_arguments.with_arguments`."""
        if arguments:
            self.set_chat_template(with_arguments(self.chat_template, arguments, where))

    def set_image_sizes(self, settings: Mapping[str, Any], where: str) -> None:
        """Set the sizes that images are brought to; ``where`` is the section of the configuration, for errors.

        Raises:
            UserError: a key that this model's image processor does not read, or a value that it cannot take.
        """
        if settings:
            what = "set vision_encoder.image_size" if self.has_vision else "this model sees no images"
            raise UserError(f"{where}: is for vision-language models of Transformers; {what}, and leave it out")

    def as_loaded(self) -> Self:
        """Return this processor without the sizes that :meth:`set_image_sizes` has set."""
        return self

    @property
    def frame(self) -> Frame:
        """What the chat template writes around messages, probed once for each template."""
        if self._frame is None or self._framed != self.chat_template:
            self._framed, self._frame = self.chat_template, None
            self._frame = probe_frame(self.tokenizer, self._render)
        return self._frame

    @abstractmethod
    def encode(self, conversation: Conversation, images: Sequence[Image.Image], *, generation: bool = False) -> Encoded:
        """Return the token ids of a conversation, with the supervised ones marked.

        A worked example, with a ChatML template and one token a word::

            conversation  user: "What is it?"   assistant: "A cat"
            rendered      <|im_start|>user⏎What is it?<|im_end|>⏎<|im_start|>assistant⏎A cat<|im_end|>⏎
            tokens        <|im_start|> user ⏎ What is it ? <|im_end|> ⏎ <|im_start|> assistant ⏎ A cat <|im_end|> ⏎
            supervised         0        0   0  0   0  0  0     0      0      0           0     0 1  1      1      0
            ends               0        0   0  0   0  0  0     0      0      0           0     0 0  0      1      0

        The answer's own text and the end token after it are supervised; the role header and the line break after the
        end token are not. With ``generation`` the text ends after ``<|im_start|>assistant⏎``, and nothing is
        supervised. An image part becomes as many tokens as this model gives an image, none of them supervised.

        Args:
            conversation: ends with an assistant message, or with a user message if ``generation`` is set.
            images: RGB, one for each image part.
            generation: end with the template's opening of the assistant's turn.

        Raises:
            BadSample: the chat template or the model cannot take this conversation.
        """

    def encode_all(self, samples: Sequence[tuple[Conversation, Sequence[Image.Image]]]) -> list[Encoded | BadSample]:
        """Return what :meth:`encode` returns for each conversation with its images, or the ``BadSample`` it raises."""
        return [attempt(self.encode, *sample) for sample in samples]

    def encode_document(self, document: Document) -> Encoded:
        """Return a document's tokens: the tokenizer's start token, the text, and the end token where it ends.

        All but the first are supervised. ``supervised`` and ``ends`` are as in :class:`~data.batch.Encoded`.
        """
        # No warning about its length; an end token written out in a document is plain text.
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
        """Return a prompt, encoded for generation, followed by an answer's tokens, all of them supervised."""
        length, new = len(prompt.input_ids), len(ids)
        tensors = dict(prompt.tensors)
        for name, tensor in tensors.items():
            if tensor.shape in ((length,), (1, length)):  # one value a token: 0 means text, except in the padding mask
                rest = tensor.new_full((*tensor.shape[:-1], new), int(name == "attention_mask"))
                tensors[name] = torch.cat([tensor, rest], -1)
        input_ids = torch.cat([prompt.input_ids, torch.tensor(ids, dtype=torch.long)])
        supervised = torch.arange(length + new) >= length
        ends = torch.zeros_like(supervised)
        return Encoded(input_ids, supervised, ends, prompt.images, tensors, videos=prompt.videos)

    def recipe(self) -> tuple[Any, ...]:
        """Return everything that decides what this processor makes of a sample; equal recipes give equal tensors."""
        return *self.text_recipe(), self.image_recipe(), self.one_row, self.features

    def text_recipe(self) -> tuple[Any, ...]:
        """Return everything that decides how a sample is rendered, and which tokens its text becomes."""
        settings = self.learn_answer_prefix, self.video_frames
        return type(self), tokenizer_recipe(self.tokenizer), self.chat_template, *settings

    @abstractmethod
    def image_recipe(self) -> Any:
        """Return everything that decides what pixels an image becomes; ``None`` for a model without vision."""

    @abstractmethod
    def image_row(self, images: Sequence[Image.Image]) -> Encoded:
        """Return a sample of these images (at least one) alone, with nothing supervised."""

    @abstractmethod
    def blank(self) -> Image.Image:
        """Return the image of the dummy sample."""

    @abstractmethod
    def dummy(self) -> Encoded:
        """Return a sample with one blank image (none for a text model) and no supervised token."""

    def image_groups(self, images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
        """Group a sample's images: within a group, one image's features may depend on the others."""
        return [images] if images else []

    def with_features(self, features: Callable[[Sequence[Image.Image]], Tensor]) -> Self:
        """Return a copy that gives features in place of pixels, such as :meth:`VisionLanguageModel.encode_images` made.

        Args:
            features: maps a group of :meth:`image_groups` to its features ``[tokens, C]``.
        """
        other = copy.copy(self)
        other.features = features
        return other

    @abstractmethod
    def collate(self, samples: Sequence[Encoded], *, padding_side: str = "right") -> ModelInputs:
        """Pad samples into one batch; ``input_ids`` and ``attention_mask`` are ``[B, L]``.

        If samples were joined there is no ``attention_mask``: ``position_ids`` ``[B, L]`` or ``[4, B, L]`` restart with
        each of them, and padding counts as one more sample.
        """

    def join(self, samples: Sequence[Encoded]) -> Encoded:
        """Join samples in one row, told apart by position ids that restart; see :mod:`.packed_rows`."""
        return join(samples, [self.positions(sample) for sample in samples])

    def positions(self, sample: Encoded) -> Tensor:
        """Return ``position_ids`` of a sample: ``[L]``, or ``[4, L]`` for M-RoPE (text, time, height, width)."""
        return torch.arange(len(sample.input_ids))

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer and image processor beside the model's weights."""

    @abstractmethod
    def image_tokens(self, sample: Encoded) -> Tensor:
        """Return which tokens of an encoded sample stand for images, bool ``[L]``."""

    @abstractmethod
    def image_blocks(self, sample: Encoded) -> list[int]:
        """Return how many image tokens each of a sample's images has, or each tile of images that are cut into tiles.

        Example: SmolVLM cuts an image into four tiles and adds the whole image, 64 tokens each: ``[64] * 5``.

        Raises:
            BadSample: the images' tokens cannot be told apart.
        """


#: Where a tokenizer was loaded from, which changes nothing that it does; its template is compared with the processor's.
_ORIGIN = {"name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "is_local"}
_ORIGIN |= {"local_files_only", "tokenizer_object", "chat_template", "tokenizer_class", "processor_class", "backend"}


def tokenizer_recipe(tokenizer: Any) -> tuple[Any, ...]:
    """Return everything that decides how a tokenizer splits a text, and what it calls its special tokens."""
    settings = {name: repr(value) for name, value in tokenizer.init_kwargs.items() if name not in _ORIGIN}
    content = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return type(tokenizer), content, tokenizer.special_tokens_map, tokenizer.padding_side, settings


def template_ends(processor: Processor) -> set[int]:
    """Return the tokens with which the chat template ends an answer, found by encoding one."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a"), ("assistant", "b"))
    ]
    try:
        sample = processor.encode(Conversation(tuple(messages)), [])
    except BadSample:  # the template always wants an image or a system prompt: the tokenizer's end token must do
        return set()
    return set(sample.input_ids[sample.ends].tolist())
