"""The samples that readers return: `Conversation` (messages and images) and `Document` (plain text)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from .errors import BadSample


@dataclass(frozen=True)
class VideoFile:
    """A video not yet read.

    Attributes:
        source: its path, or the bytes of its file.
    """

    source: str | bytes


#: An image not yet decoded: a path, the bytes of an image file, or a decoded image. In the place of a video, its file.
ImageSource = str | bytes | Image.Image | VideoFile


@dataclass(frozen=True)
class Conversation:
    """Messages in the chat format of Transformers, and the images they mention.

    Attributes:
        messages: ``{"role": "system" | "user" | "assistant" | "tool", "content": [part, …]}`` with parts
            ``{"type": "text", "text": str}``, ``{"type": "image"}`` and ``{"type": "video"}``. An image that is a frame
            of a video has its :class:`~data.video.Frame` under ``frame``. Content is always a list. Optional keys are
            ``reasoning_content`` (str), ``tool_calls`` (list), ``tool_call_id`` and ``name`` (str), which the chat
            template renders, and ``supervised: False`` on an assistant message that is context only.
        images: the k-th belongs to the k-th image or video part, counted through all messages.
        tools: JSON schemas of the tools, passed to the template as ``tools``.
        source: the name of the data source, for reports.
        line: 1-based line (JSONL) or record (other formats) in that source, for reports.
        metadata: further values of the record that evaluation uses, such as ``question_type`` or ``answers``.
    """

    messages: tuple[dict[str, Any], ...]
    images: tuple[ImageSource, ...] = ()
    source: str = ""
    line: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()

    def prompt(self) -> Conversation:
        """Return the conversation without an assistant message at its end, for a model to answer."""
        answered = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        messages = self.messages[:-1] if answered else self.messages
        return replace(self, messages=messages, images=self.images[: count_images(messages)])

    def before_last_answer(self) -> Conversation:
        """Return the conversation up to its last supervised answer, for a model to answer.

        Raises:
            BadSample: no answer is supervised.
        """
        answers = [k for k, message in enumerate(self.messages) if is_answer(message)]
        if not answers:
            raise BadSample("no supervised token", "every answer is masked")
        messages = self.messages[: answers[-1]]
        return replace(self, messages=messages, images=self.images[: count_images(messages)])

    @property
    def references(self) -> list[str]:
        """The right answers: ``metadata["answers"]`` when given, else the last assistant message's text."""
        answers = self.metadata.get("answers")
        if answers:
            return [answer_text(answer) for answer in answers]
        for message in reversed(self.messages):
            if message["role"] == "assistant":
                return [message_text(message)]
        return []

    @property
    def question(self) -> str:
        """The text of the last user message."""
        return next((message_text(m) for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass(frozen=True)
class Document:
    """Plain text to learn token by token: a document, or a piece of a long one.

    Attributes:
        text: not empty.
        source, line: as in :class:`Conversation`.
        last: whether the document ends here, so that an end token follows.
    """

    text: str
    source: str = ""
    line: int = 0
    last: bool = True


def answer_text(answer: Any) -> str:
    """Return the text of a reference answer, given as a text or as an object with an ``answer``."""
    return str(answer["answer"]) if isinstance(answer, Mapping) else str(answer)


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def count_images(messages: tuple[dict[str, Any], ...]) -> int:
    """Return the number of image and video parts."""
    count = 0
    for message in messages:
        count += sum(part["type"] in ("image", "video") for part in message["content"])
    return count


#: An answer's content with its thought: the opening mark, the thought, the closing mark, the text.
_THOUGHT = re.compile(r"(\s*(?:<think>)?)(.*)(</think>)(.*)", re.DOTALL)


def thought_parts(message: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Split a content into opening mark, thought, closing mark and text, without stripping white space.

    Without a thought before ``</think>``, or without a text after it, everything is text.
    """
    content = "".join(part["text"] for part in message["content"] if part["type"] == "text")
    match = _THOUGHT.fullmatch(content)
    if match is None or not match[2].strip() or not match[4].strip() or message.get("reasoning_content"):
        return "", "", "", content
    return match[1], match[2], match[3], match[4]


def split_thought(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return an answer's thought, from ``reasoning_content`` or ``<think>…</think>``, and its text, both stripped."""
    _, thought, _, text = thought_parts(message)
    return (message.get("reasoning_content") or thought).strip(), text.strip()


def is_answer(message: Mapping[str, Any]) -> bool:
    """Return whether a message is an assistant's and is supervised."""
    return message["role"] == "assistant" and message.get("supervised", True)


def answer_pieces(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the texts that tokens' spans refer to: each assistant message's thought and text, in turn."""
    pieces: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            pieces += split_thought(message)
    return pieces
