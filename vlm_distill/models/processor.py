"""Processor: turns conversations into one model's inputs and marks the supervised tokens."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from data.batch import Encoded, ModelInputs
from data.conversation import Conversation, Document
from data.errors import BadSample, UserError

from .packed_rows import join
from .template_arguments import with_arguments
from .template_frame import Frame, probe_frame

Prompt = tuple[Conversation, Sequence[Image.Image]]


class Processor(ABC):
    """Turns conversations into one model's inputs and marks the supervised tokens."""

    tokenizer: Any
    has_vision: bool
    #: What is known of images without their pixels; see :meth:`with_features`.
    features: Callable[[Sequence[Image.Image]], Tensor] | None = None
    #: Whether the model wants all samples that share a row in one; the model sets it.
    one_row: bool = False
    #: Whether what the chat template writes before a plain answer is supervised (``data.template_text: learn``).
    learn_answer_prefix: bool = False
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

    def set_image_sizes(self, settings: Mapping[str, Any], where: str) -> None:
        """Set the sizes that images are brought to; ``where`` is the section of the configuration, for errors.

        Raises:
            UserError: a key that this model's image processor does not read, or a value that it cannot take.
        """
        if settings:
            what = "set vision_encoder.image_size" if self.has_vision else "this model sees no images"
            raise UserError(f"{where}: is for vision-language models of Transformers; {what}, and leave it out")

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
    def image_row(self, images: Sequence[Image.Image]) -> Encoded:
        """A row with these images, of which there is at least one, and nothing supervised."""

    @abstractmethod
    def blank(self) -> Image.Image:
        """The image of a dummy row."""

    @abstractmethod
    def dummy(self) -> Encoded:
        """A row with one blank image (no image for a text model) and no supervised token."""

    def image_groups(self, images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
        """A sample's images in the groups within which what is seen of one may depend on the others."""
        return [images] if images else []

    def with_features(self, features: Callable[[Sequence[Image.Image]], Tensor]) -> Self:
        """The same processor, which gives what :meth:`VisionLanguageModel.see` made of images in place of pixels.

        Args:
            features: of a group that :meth:`image_groups` makes, ``[tokens, C]``.
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


def template_ends(processor: Processor) -> set[int]:
    """The tokens with which the chat template ends an answer, found by encoding one."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a"), ("assistant", "b"))
    ]
    try:
        sample = processor.encode(Conversation(tuple(messages)), [])
    except BadSample:  # a template that always wants an image or a system prompt: the tokenizer's end token must do
        return set()
    return set(sample.input_ids[sample.ends].tolist())
