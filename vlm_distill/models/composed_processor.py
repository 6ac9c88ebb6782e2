"""Processor of models assembled from parts: chat template, tokenizer and image transform."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.batch import Encoded, ModelInputs
from data.conversation import Conversation, count_images
from data.errors import BadSample, UserError

from .answer_spans import Span, find_answers
from .chat import DEFAULT_TEMPLATE, held, plain_messages, rendered, special_ids, written_texts
from .common import booleans, integers
from .image_transform import ImageTransform
from .packed_rows import row_positions
from .processor import Processor
from .supervision import mark_tokens, token_spans
from .template_marks import BREAK, IMAGE, PRIVATE
from .templates import apply_template

_MARKS = re.compile(f"([{IMAGE}{BREAK}])")


class ComposedProcessor(Processor):
    """Chat template, tokenizer and image transform; each image part becomes a fixed number of positions.

    Image positions contain the pad id and are marked in ``image_mask``: no token of the vocabulary means "image".

    Args:
        tokenizer: a fast tokenizer; one without a chat template gets :data:`~vlm_distill.models.chat.DEFAULT_TEMPLATE`.
        transform: ``None`` for a language model.
        tokens: number of positions of an image.
    """

    #: Replaces :meth:`rendered_sample` where another model asks for the same texts.
    shared_rendering: Callable[..., tuple[str, list[Span]]] | None = None

    def __init__(self, tokenizer: Any, transform: ImageTransform | None = None, tokens: int = 0) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer: {type(tokenizer).__name__} of '{tokenizer.name_or_path}' is not a fast tokenizer; "
                "character offsets need one, choose a model with a tokenizer.json"
            )
        if tokenizer.chat_template is None:
            tokenizer.chat_template = DEFAULT_TEMPLATE
        self.tokenizer = tokenizer
        self.transform = transform
        self.tokens = tokens
        self.has_vision = transform is not None
        self._special = special_ids(tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = 0 if pad is None else pad

    @property
    def chat_template(self) -> Any:
        return self.tokenizer.chat_template

    def recipe(self) -> tuple[Any, ...]:
        return *super().recipe(), self.tokens

    def text_recipe(self) -> tuple[Any, ...]:
        return *super().text_recipe(), self.has_vision

    def image_recipe(self) -> ImageTransform | None:
        return self.transform

    @property
    def image_function(self) -> ImageTransform | None:
        """What turns an image into pixels."""
        return self.transform

    def set_image_function(self, function: Any) -> None:
        self.transform = function

    def set_chat_template(self, template: Any) -> None:
        self.tokenizer = copy.deepcopy(self.tokenizer)  # it may be the teacher's
        self.tokenizer.chat_template = template

    def _render(
        self, messages: Sequence[dict[str, Any]], generation: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        flat = [{**m, "content": self._flat_content(m)} for m in messages]
        return apply_template(self.tokenizer, flat, tools, generation)

    def _flat_content(self, message: Mapping[str, Any]) -> str:
        parts = message["content"]
        text = "".join(part["text"] if part["type"] == "text" else IMAGE for part in parts)
        for token in self._frame.control if self._frame and message["role"] != "assistant" else ():
            text = text.replace(token, token[:1] + BREAK + token[1:])
        return text

    def encode(self, conversation: Conversation, images: Sequence[Image.Image], *, generation: bool = False) -> Encoded:
        render = self.shared_rendering or self.rendered_sample
        text, spans = render(conversation, images, generation)
        ids, offsets = self._tokenized(text)
        supervised, ends = mark_tokens(text, offsets, ids, spans, self._special)
        encoded = self._encoded(ids, supervised, ends, images)
        encoded.spans = token_spans(text, offsets, supervised, ends, spans)
        return encoded

    def rendered_sample(
        self, conversation: Conversation, images: Sequence[Image.Image], generation: bool
    ) -> tuple[str, list[Span]]:
        """Check and render a sample. Return the text, with marks in place of images, and the spans of its answers."""
        messages, frame = conversation.messages, self.frame
        self._check(conversation, images)
        render = partial(self._render, tools=conversation.tools)
        spans: list[Span] = []
        if generation:
            text = rendered(render, plain_messages(messages, frame), True)
        else:
            text, spans = find_answers(render, messages, frame, self.learn_answer_prefix)
        if text.count(IMAGE) != len(images):
            raise BadSample("chat template drops or repeats images", f"{text.count(IMAGE)} of {len(images)}")
        return text, spans

    def _tokenized(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a rendered text, -1 for an image's positions, and each one's span in the text."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for piece in _MARKS.split(text):
            if piece == IMAGE:
                ids += [-1] * self.tokens
                offsets += [(at, at + 1)] * self.tokens
            if piece in (IMAGE, BREAK):
                at += 1
                continue
            coded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += coded["input_ids"]
            offsets += [(at + a, at + b) for a, b in coded["offset_mapping"]]
            at += len(piece)
        return ids, offsets

    def _check(self, conversation: Conversation, images: Sequence[Image.Image]) -> None:
        texts = [text for message in conversation.messages for text in written_texts(message)]
        if held(PRIVATE, texts):
            raise BadSample("text holds a private-use character that marks images", "U+10FFF0 to U+10FFFD")
        # Answers, and what a template writes as JSON, are not escaped.
        texts = [text for m in conversation.messages if m["role"] == "assistant" for text in written_texts(m)]
        if token := held(self.frame.control, texts):
            raise BadSample("answer holds a control token", token)
        if token := held(self.frame.control, [json.dumps(conversation.tools, ensure_ascii=False)]):
            raise BadSample("text holds a control token", f"{token} among the tools")
        if images and not self.has_vision:
            raise BadSample("model takes no images", f"{len(images)} given")
        if count_images(conversation.messages) != len(images):
            raise BadSample("images and image parts differ in number", f"{len(images)} images")

    def _encoded(
        self, ids: list[int], supervised: list[bool], ends: list[bool], images: Sequence[Image.Image]
    ) -> Encoded:
        input_ids = integers(ids)
        tensors = {}
        if self.has_vision:
            tensors["image_mask"] = input_ids < 0
        if images and self.features is not None:
            tensors["vision_features"] = torch.stack([self.features([image]) for image in images])
        elif images and self.transform is not None:
            tensors["pixel_values"] = torch.stack([self.transform(image) for image in images])
        return Encoded(
            input_ids.masked_fill(input_ids < 0, self._pad),
            booleans(supervised),
            booleans(ends),
            len(images),
            tensors,
        )

    def dummy(self) -> Encoded:
        return self.image_row([] if self.transform is None else [self.blank()])

    def blank(self) -> Image.Image:
        assert self.transform is not None
        return self.transform.blank()

    def image_row(self, images: Sequence[Image.Image]) -> Encoded:
        ids = [-1] * self.tokens * len(images) + [self._pad]
        nothing = [False] * len(ids)
        return self._encoded(ids, nothing, nothing, images)

    def image_groups(self, images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
        return [[image] for image in images]

    def collate(self, samples: Sequence[Encoded], *, padding_side: str = "right") -> ModelInputs:
        """Pad samples into one batch.

        Returns:
            ``input_ids``, ``attention_mask``, ``position_ids`` int64 ``[B, L]``; with a vision encoder ``image_mask``
            bool ``[B, L]`` and, if a sample has an image, ``pixel_values`` float32 ``[images, 3, H, W]`` or
            ``vision_features`` ``[images, tokens, C]``. Without ``attention_mask`` if samples were joined.
        """

        def padded(rows: list[Tensor], value: float) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=padding_side)

        mask = padded([torch.ones_like(s.input_ids) for s in samples], 0)
        inputs = ModelInputs(
            input_ids=padded([s.input_ids for s in samples], self._pad),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        )
        if any("position_ids" in s.tensors for s in samples):
            del inputs["attention_mask"]
            inputs["position_ids"] = row_positions(samples, mask.shape[1])
        if self.has_vision:
            inputs["image_mask"] = padded([s.tensors["image_mask"] for s in samples], False)
            name = "pixel_values" if self.features is None else "vision_features"
            seen = [s.tensors[name] for s in samples if s.images]
            if seen:
                inputs[name] = torch.cat(seen)
        return inputs

    def image_tokens(self, sample: Encoded) -> Tensor:
        mask = sample.tensors.get("image_mask")
        return torch.zeros_like(sample.supervised) if mask is None else mask

    def image_blocks(self, sample: Encoded) -> list[int]:
        return [self.tokens] * sample.images

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
