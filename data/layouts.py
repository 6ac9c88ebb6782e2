"""Layouts of records: each public one, recognised by its columns, becomes the same conversation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .conversation import Conversation, ImageSource, message_text
from .errors import BadSample
from .images import is_url

PLACEHOLDER = "<image>"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_METADATA = ("id", "question_id", "question_type", "answer_type", "category")
_NO_IMAGE = ("", "none", "null", "nan")

#: A message before it is a conversation's: role and raw content.
_Turn = tuple[str, Any]


@dataclass(frozen=True)
class Layout:
    """How records of one layout are read.

    Attributes:
        column: what a record of this layout has under this key, beside its images.
        whose: data sets that come in it.
        turns: the record's messages as pairs of role and raw content.
        leading: images without a placeholder of their own precede all others, at the front of the first user message;
            elsewhere placeholders and images that differ in number are a bad sample, unless there are no placeholders.
    """

    column: str
    whose: str
    turns: Callable[[Mapping[str, Any], str], list[_Turn]]
    leading: bool = False


def _listed(record: Mapping[str, Any], column: str) -> list[_Turn]:
    """A list of messages, each with ``role`` and ``content`` or ``from`` and ``value``."""
    return [_turn(turn) for turn in _objects(record, column)]


def _paired(record: Mapping[str, Any], column: str) -> list[_Turn]:
    """A list of exchanges, each with what ``user`` and ``assistant`` say."""
    return [(role, turn.get(role)) for turn in _objects(record, column) for role in ("user", "assistant")]


def _asked(record: Mapping[str, Any], column: str) -> list[_Turn]:
    """One question with its answer or answers."""
    answer = _answer(record)
    return [("user", record[column])] + ([] if answer is None else [("assistant", answer)])


def _objects(record: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    turns = record[column]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadSample("messages are not a list of objects", f"key {column!r}")
    return turns


def _turn(turn: Mapping[str, Any]) -> _Turn:
    name = turn.get("role") or turn.get("from")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadSample("unknown role", repr(name)[:80])
    if turn.get("loss") is False:  # to learn what its author kept out of the loss would be a silent mistake
        raise BadSample("messages kept out of the loss are not supported", f"a message of the {role} has loss: false")
    content = turn.get("content")
    return role, turn.get("value") if content is None else content


def _answer(record: Mapping[str, Any]) -> str | None:
    """What the assistant says in a question row: ``answer``, else the commonest of ``answers``, the first in a tie."""
    if record.get("choices") or record.get("options"):  # the answer may be a number or a letter of a choice
        raise BadSample("multiple-choice rows are not supported", "write question and choices as a conversation")
    answer = record.get("answer")
    if answer is None:
        texts = [str(a.get("answer") if isinstance(a, Mapping) else a) for a in _answers(record)]
        return Counter(texts).most_common(1)[0][0] if texts else None
    missing = isinstance(answer, float) and not math.isfinite(answer)  # what a table has where it has nothing
    if isinstance(answer, bool) or missing or not isinstance(answer, str | int | float):
        raise BadSample("answer is not a text", repr(answer)[:80])
    return str(answer)


def _answers(record: Mapping[str, Any]) -> list[Any]:
    answers = record.get("answers")
    if answers is None:
        return []
    return answers if isinstance(answers, list) else [answers]


#: The first whose column is there.
LAYOUTS = (
    Layout("messages", "Transformers, TRL, ms-swift, UltraChat", _listed),
    Layout("conversations", "LLaVA-665k, LLaVA-OneVision, Cambrian", _listed),
    Layout("conversation", "Mantis-Instruct", _listed, leading=True),
    Layout("texts", "The Cauldron", _paired),
    Layout("question", "questions with answers", _asked),
)

#: Columns that hold a record's text.
TEXT_COLUMNS = (*(layout.column for layout in LAYOUTS), "answer", "answers", "text")


def layout_of(record: Mapping[str, Any]) -> Layout:
    """The layout of a record. Raises ``BadSample`` where it has none that is known."""
    for layout in LAYOUTS:
        if record.get(layout.column) is not None:
            return layout
    raise BadSample("unknown layout", f"keys: {', '.join(map(str, record)) or 'none'}")


def to_conversation(
    record: Any, *, images: Path = Path(), source: str = "", line: int = 0, answers_required: bool = True
) -> Conversation:
    """One record of any supported layout as a conversation.

    The layouts are those of :data:`LAYOUTS`, recognised by their columns. Images stand in ``images`` or ``image`` or in
    the image parts themselves. ``<image>`` in a string (or in a text part where no message has an image part) becomes
    an image part at its place; the text around it stays exactly as it is. Where a record has images and nothing says
    where they belong, they precede the text of the first user message. A part of a video becomes its frames' parts.

    Args:
        record: what a line of JSON or a row of a table holds.
        images: the folder that relative image paths start from.
        source: name of the source, for reports.
        line: place in the source, for reports.
        answers_required: refuse a record without an assistant's answer.

    Raises:
        BadSample: the record has no supported layout, or its messages or images are not sound.
    """
    if not isinstance(record, Mapping):
        raise BadSample("not a JSON object", type(record).__name__)
    for key in ("video", "videos", "audio", "audios"):
        if record.get(key):
            raise BadSample("video and audio are not supported", f"key {key!r}; a video goes in as its frames")
    layout = layout_of(record)
    turns = layout.turns(record, layout.column)
    explicit = any(isinstance(content, list) and any(map(_is_seen, content)) for _, content in turns)
    messages = [{"role": role, "content": _parts(content, explicit, images)} for role, content in turns]
    _check_order([role for role, _ in turns], answers_required)
    given = images_of(record.get("images"), images) or images_of(record.get("image"), images)
    placed = _place(messages, given, layout.leading)
    _check_texts(messages)
    return Conversation(tuple(messages), tuple(placed), source, line, _metadata(record))


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _is_video(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "video"


def _is_seen(part: Any) -> bool:
    return _is_image(part) or _is_video(part)


def _parts(content: Any, explicit: bool, folder: Path) -> list[dict[str, Any]]:
    """Content as a list of parts. An image part that brings its own image holds it under ``image``, until `_place`."""
    if isinstance(content, str):
        return _split(content)
    if not isinstance(content, list):
        raise BadSample("message without text", repr(content)[:80])
    parts: list[dict[str, Any]] = []
    for part in content:
        if _is_image(part):
            own = [image for key in ("image", "bytes", "path", "url") for image in images_of(part.get(key), folder)]
            parts.append({"type": "image", "image": own[0]} if own else {"type": "image"})
        elif _is_video(part):
            frames = images_of(part.get("frames"), folder)
            if not frames:
                raise BadSample("video without frames", "files of videos are not read; list images under 'frames'")
            parts += [{"type": "image", "image": frame} for frame in frames]
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            parts += [{"type": "text", "text": part["text"]}] if explicit else _split(part["text"])
        else:
            raise BadSample("unknown message part", repr(part)[:80])
    return parts


def _split(text: str) -> list[dict[str, Any]]:
    """A string cut at its placeholders."""
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _place(messages: list[dict[str, Any]], images: list[ImageSource], leading: bool) -> list[ImageSource]:
    """All images in the order of the image parts, which lose their own.

    Parts are made at the front of the first user message where there are none, or, with ``leading``, too few.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    placeholders = sum("image" not in part for part in parts)
    if (not parts or leading) and placeholders < len(images):
        first = next(message for message in messages if message["role"] == "user")
        made: list[dict[str, Any]] = [{"type": "image"} for _ in range(len(images) - placeholders)]
        first["content"][:0] = made
        parts, placeholders = made + parts, len(images)
    if placeholders != len(images):
        raise BadSample(
            "image count mismatch", f"{_count(placeholders, 'placeholder')}, {_count(len(images), 'image')}"
        )
    remaining = iter(images)
    return [part.pop("image") if "image" in part else next(remaining) for part in parts]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def images_of(value: Any, folder: Path) -> list[ImageSource]:
    """The images of one value: none, one, or one per item of a list. Relative paths start from ``folder``."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        if value.strip().lower() in _NO_IMAGE:
            return []
        return [value if is_url(value) else str(folder / value)]
    if isinstance(value, bytes | Image.Image):
        return [value]
    if isinstance(value, list | tuple):
        return [image for item in value for image in images_of(item, folder)]
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes | None):
        return [value["bytes"]] if value.get("bytes") is not None else images_of(value.get("path"), folder)
    raise BadSample("unknown kind of image", f"a value of type {type(value).__name__}")


def _check_order(roles: list[str], answers_required: bool) -> None:
    if "system" in roles[1:]:
        raise BadSample("system message is not the first", f"roles: {', '.join(roles)}")
    speakers = roles[1:] if roles[:1] == ["system"] else roles
    if "user" not in speakers:
        raise BadSample("no user message", f"roles: {', '.join(roles) or 'none'}")
    if speakers[0] != "user":
        raise BadSample("assistant speaks before the user", f"roles: {', '.join(roles)}")
    if answers_required and "assistant" not in speakers:
        raise BadSample("no assistant answer", f"roles: {', '.join(roles)}")


def _check_texts(messages: list[dict[str, Any]]) -> None:
    for number, message in enumerate(messages, 1):
        try:
            message_text(message).encode()
        except UnicodeEncodeError as error:  # half of an escaped emoji, say: JSON lets it pass, tokenizers do not
            raise BadSample("invalid Unicode", f"message {number}: {error}") from None
        has_image = any(part["type"] == "image" for part in message["content"])
        if message["role"] == "assistant" and not message_text(message):
            raise BadSample("empty answer", f"message {number}")
        if message["role"] == "user" and not message_text(message) and not has_image:
            raise BadSample("empty user message", f"message {number}")


def _metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    extra = record.get("metadata")
    metadata = dict(extra) if isinstance(extra, Mapping) else {}
    metadata |= {key: record[key] for key in _METADATA if record.get(key) is not None}
    if answers := _answers(record):
        metadata["answers"] = answers
    return metadata
