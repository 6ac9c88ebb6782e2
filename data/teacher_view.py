"""What a teacher sees of a sample where that differs from what its student sees: `View`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image, ImageFilter

from .conversation import Conversation, is_answer, split_thought

#: A conversation with its decoded images.
Seen = tuple[Conversation, Sequence[Image.Image]]


@dataclass(frozen=True)
class View:
    """Changes to what comes before the answers of a conversation; the answers themselves stay as they are.

    Attributes:
        system: text of the system message, in place of the sample's own.
        question: text of each question that is answered; holds ``{question}`` once, the sample's own text, and may hold
            ``{answer}``, the right answer.
        images: ``keep`` or ``drop`` them.
        blur: radius in pixels of a Gaussian blur; 0 for none.
        downsample: factor by which images are made smaller and then larger again; 1 for none.
    """

    system: str | None = None
    question: str | None = None
    images: Literal["keep", "drop"] = "keep"
    blur: float = 0.0
    downsample: float = 1.0

    def of(self, conversation: Conversation, images: Sequence[Image.Image]) -> Seen:
        """Return what the teacher sees of a conversation.

        Example: with ``question="{question} (Answer: {answer})"`` and ``images="drop"``, a user message of an image and
        "What is it?", answered by "A cat.", becomes the text ``What is it? (Answer: A cat.)`` without an image.
        """
        messages = list(conversation.messages)
        if self.question is not None:
            messages = _with_questions(messages, self.question)
        if self.system is not None:
            messages = _with_system(messages, self.system)
        if self.images == "drop":
            messages = [_without_images(message) for message in messages]
            return replace(conversation, messages=tuple(messages), images=()), []
        return replace(conversation, messages=tuple(messages)), [self._degraded(image) for image in images]

    def before_last_answer(self, conversation: Conversation, images: Sequence[Image.Image]) -> Seen:
        """Return what the teacher sees of a conversation up to its last supervised answer, which questions may quote.

        Raises:
            BadSample: no answer is supervised.
        """
        asked = conversation.before_last_answer()
        answered = replace(
            conversation, messages=conversation.messages[: len(asked.messages) + 1], images=conversation.images
        )
        seen, shown = self.of(answered, images)
        prompt = seen.before_last_answer()
        return prompt, shown[: len(prompt.images)]

    def _degraded(self, image: Image.Image) -> Image.Image:
        if self.downsample > 1:
            small = (max(1, round(image.width / self.downsample)), max(1, round(image.height / self.downsample)))
            image = image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
        return image.filter(ImageFilter.GaussianBlur(self.blur)) if self.blur else image


def _with_questions(messages: Sequence[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return the messages with the text of every answered question put into a template."""
    before, after = template.split("{question}")
    changed = list(messages)
    answer: str | None = None
    # From the end: a question's answer is the last one before the next question.
    for number in reversed(range(len(messages))):
        message = messages[number]
        if is_answer(message):
            answer = split_thought(message)[1] if answer is None else answer
        elif message["role"] == "user" and answer is not None:
            changed[number] = _around(message, before.replace("{answer}", answer), after.replace("{answer}", answer))
            answer = None
    return changed


def _around(message: Mapping[str, Any], before: str, after: str) -> dict[str, Any]:
    """Return a message with text in front of its first text and behind its last one; images keep their places."""
    content = [dict(part) for part in message["content"]]
    texts = [part for part in content if part["type"] == "text"]
    if not texts:
        texts = [{"type": "text", "text": ""}]
        content += texts
    texts[0]["text"] = before + texts[0]["text"]
    texts[-1]["text"] += after
    return {**message, "content": content}


def _with_system(messages: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the messages with this system message first, in place of one that is there."""
    own = {"role": "system", "content": [{"type": "text", "text": text}]}
    if messages and messages[0]["role"] == "system":
        kept = [part for part in messages[0]["content"] if part["type"] != "text"]
        return [{**own, "content": [*own["content"], *kept]}, *messages[1:]]
    return [own, *messages]


def _without_images(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [part for part in message["content"] if part["type"] != "image"]}
