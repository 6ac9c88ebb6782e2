"""Layouts of records: recognise each public layout by its columns and convert it to a conversation."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from .conversation import Conversation, ImageSource, answer_text, message_text
from .errors import BadSample
from .image_values import images_of
from .keys import MASKS, check_keys, is_empty, trained_on
from .messages import (
    RawMessage,
    check_grounding,
    cut_into_parts,
    has_image_parts,
    place_images,
    read_message,
    read_tools,
    videos_of,
)

_METADATA = ("id", "question_id", "question_type", "answer_type", "category")
#: Keys of a record that name what it shows.
SHOWN = ("images", "image", "videos", "video")
#: Keys that a record of any layout may have.
_COMMON = (*SHOWN, "system", "tools", "functions", "metadata", "objects", *_METADATA, *MASKS)


@dataclass(frozen=True)
class Layout:
    """How records of one layout are read.

    Attributes:
        column: the key by which a record of this layout is recognised.
        whose: data sets in this layout.
        read: returns a record's messages with their raw content.
        more: other keys that ``read`` uses.
        leading: whether images without a placeholder precede all others, at the front of the first user message. In
            other layouts, placeholders and images must agree in number, unless there are no placeholders.
        asks: whether the record is a question with its answer, not a list of messages.
        describes: whether the column describes an image, so that a record without one has another layout.
    """

    column: str
    whose: str
    read: Callable[[Mapping[str, Any], Counter[str]], list[RawMessage]]
    more: tuple[str, ...] = ()
    leading: bool = False
    asks: bool = True
    describes: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a record that are read."""
        return (self.column, *self.more, *_COMMON)


def _messages(column: str) -> Callable[[Mapping[str, Any], Counter[str]], list[RawMessage]]:
    """Read a list of messages, each with ``role`` and ``content`` or ``from`` and ``value``."""
    return lambda record, unread: [read_message(turn, unread) for turn in _objects(record[column], column)]


def _exchanges(record: Mapping[str, Any], unread: Counter[str]) -> list[RawMessage]:
    """Read a list of exchanges, each with the texts of ``user`` and ``assistant``."""
    messages = []
    for turn in _objects(record["texts"], "texts"):
        check_keys(turn, ("user", "assistant"), unread, "texts[].")
        messages += [_message(role, turn.get(role)) for role in ("user", "assistant")]
    return messages


def _prompted(record: Mapping[str, Any], unread: Counter[str]) -> list[RawMessage]:
    """Read a prompt and a completion, each a text or a list of messages."""
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.get(column)
        if isinstance(value, list):
            messages += [read_message(turn, unread) for turn in _objects(value, column)]
        elif value is not None:
            messages.append(_message(role, value))
    if isinstance(record.get("label"), bool):
        raise BadSample("preference data is not supported", "key 'label'; keep the rows with true, without it")
    return messages


def _asked(question: str, answer: str) -> Callable[[Mapping[str, Any], Counter[str]], list[RawMessage]]:
    """Read a question and its answer, with the exchanges before them under ``history``."""

    def read(record: Mapping[str, Any], _: Counter[str]) -> list[RawMessage]:
        asked = _message("user", record[question])
        return [*_history(record), asked, *_answered(record.get(answer))]

    return read


def _instructed(record: Mapping[str, Any], _: Counter[str]) -> list[RawMessage]:
    """Read an instruction, its input (on the line after it), and the output."""
    parts = [record.get(key) for key in ("instruction", "input") if not is_empty(record.get(key))]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise BadSample("message without text", repr(parts)[:80])
    return [*_history(record), _message("user", "\n".join(texts)), *_answered(record.get("output"))]


def _questioned(record: Mapping[str, Any], _: Counter[str]) -> list[RawMessage]:
    """Read one question with its answer or answers."""
    if not is_empty(record.get("A")) and not is_empty(record.get("B")):  # the columns of VLMEvalKit's tables
        raise BadSample(
            "multiple-choice rows are not supported",
            "keys A and B; write them as a conversation, or name a benchmark's file by its benchmark",
        )
    return [_message("user", record["question"]), *_answered(_commonest_answer(record))]


def _described(column: str) -> Callable[[Mapping[str, Any], Counter[str]], list[RawMessage]]:
    """Read a text about an image, which becomes the answer to a question that is only the image."""
    return lambda record, _: [_message("user", ""), *_answered(record[column])]


def _message(role: str, content: Any) -> RawMessage:
    return {"role": role, "content": content}


def _answered(answer: Any) -> list[RawMessage]:
    return [] if is_empty(answer) and answer != "" else [_message("assistant", answer)]


def _history(record: Mapping[str, Any]) -> list[RawMessage]:
    """Return earlier exchanges, given as pairs of a question and its answer."""
    history = record.get("history")
    if is_empty(history):
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadSample("history is not a list of pairs", repr(history)[:80])
    messages = []
    for question, answer in history:
        messages += [_message("user", question), _message("assistant", answer)]
    return messages


def _objects(turns: Any, column: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a table's list, kept as JSON
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise BadSample("messages are not a list of objects", f"key {column!r}: {error}"[:200]) from None
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadSample("messages are not a list of objects", f"key {column!r}")
    return turns


def _commonest_answer(record: Mapping[str, Any]) -> str | None:
    """Return the answer of a question record.

    It is ``answer``, else ``multiple_choice_answer``, else the commonest of ``answers`` (the first of a tie).
    """
    answer = record.get("answer")
    if answer is None:
        answer = record.get("multiple_choice_answer")
    if answer is None:
        texts = [answer_text(one) for one in _answers(record)]
        return Counter(texts).most_common(1)[0][0] if texts else None
    missing = isinstance(answer, float) and not math.isfinite(answer)  # an empty cell of a table
    if isinstance(answer, bool) or missing or not isinstance(answer, str | int | float):
        raise BadSample("answer is not a text", repr(answer)[:80])
    return str(answer)


def _answers(record: Mapping[str, Any]) -> list[Any]:
    """Return the reference answers of a question record: texts, or objects with an ``answer``."""
    answers = record.get("answers")
    if is_empty(answers):
        return []
    if isinstance(answers, Mapping) and isinstance(answers.get("answer"), list):
        answers = answers["answer"]  # a list of objects stored by column, as in some tables
    found = answers if isinstance(answers, list) else [answers]
    for answer in found:
        text = answer.get("answer") if isinstance(answer, Mapping) else answer
        if text != "" and (is_empty(text) or isinstance(text, list | Mapping)):
            raise BadSample("answer is not a text", f"answers: {answer!r:.70}")
    return found


#: A record has the first layout whose column it has.
LAYOUTS = (
    Layout("messages", "Transformers, TRL, ms-swift, OpenAI", _messages("messages"), asks=False),
    Layout("conversations", "LLaVA-665k, LLaVA-OneVision, ShareGPT", _messages("conversations"), asks=False),
    Layout("conversation", "Mantis-Instruct", _messages("conversation"), leading=True, asks=False),
    Layout("texts", "The Cauldron", _exchanges, asks=False),
    Layout("question", "questions", _questioned, ("answer", "answers", "multiple_choice_answer")),
    Layout("prompt", "TRL", _prompted, ("completion", "label")),
    Layout("query", "ms-swift", _asked("query", "response"), ("response", "history")),
    Layout("instruction", "Alpaca", _instructed, ("input", "output", "history")),
    Layout("input", "Alpaca without instructions", _instructed, ("output", "history")),
    Layout("prefix", "PaliGemma", _asked("prefix", "suffix"), ("suffix", "history")),
    Layout("caption", "captions", _described("caption"), describes=True),
    Layout("text", "captions", _described("text"), describes=True),
)

_READ = dict.fromkeys(chain.from_iterable(layout.keys for layout in LAYOUTS))
#: The names that ``columns`` of a source may assign.
COLUMNS = tuple(key for key in _READ if key not in MASKS)
#: Columns that hold a record's text.
TEXT_COLUMNS = tuple(key for key in COLUMNS if key not in (*SHOWN, "metadata", "objects", *_METADATA))


def layout_of(record: Mapping[str, Any], has_image: bool = False) -> Layout:
    """Return the layout of a record. Raise ``BadSample`` if it is unknown."""
    for layout in LAYOUTS:
        if record.get(layout.column) is not None and (has_image or not layout.describes):
            return layout
    raise BadSample("unknown layout", f"keys: {', '.join(map(str, record)) or 'none'}")


def to_conversation(
    record: Any,
    *,
    images: Path = Path(),
    source: str = "",
    line: int = 0,
    answers_required: bool = True,
    unread: Counter[str] | None = None,
    chosen: Collection[str] = (),
) -> Conversation:
    """Convert one record of any supported layout to a conversation.

    The layouts are those of :data:`LAYOUTS`, recognised by their columns. Images are found under ``images`` or
    ``image``, or in image parts. ``<image>`` in a text becomes an image part (in a text part only if no message has
    image parts), and ``<image 2>`` stands for the second image; the text around it is unchanged. If nothing says where
    a record's images belong, they precede the text of the first user message. Files under ``videos`` or ``video`` are
    placed alike, at ``<video>``. A video part that lists frames becomes an image part for each.

    Args:
        record: the content of a line of JSON or of a row of a table.
        images: the folder that relative image paths start from.
        source: name of the source, for reports.
        line: position in the source, for reports.
        answers_required: refuse a record without an assistant's answer.
        unread: counts the keys that were not read.
        chosen: the names that the user's ``columns`` assigned.

    Raises:
        BadSample: the record has no supported layout, its messages or images are invalid, or it has a key that would
            change its meaning and is not read.
    """
    if not isinstance(record, Mapping):
        raise BadSample("not a JSON object", type(record).__name__)
    unread = Counter() if unread is None else unread
    given = _listed(record, ("images", "image"), partial(images_of, folder=images, unread=unread), unread, chosen)
    videos = _listed(record, ("videos", "video"), partial(videos_of, folder=images), unread, chosen)
    layout = _checked_layout(record, bool(given or videos), unread, chosen)
    messages = _with_system(record.get("system"), layout.read(record, unread))
    marks = not has_image_parts(messages)
    for message in messages:
        shown = bool(given), bool(videos)
        message["content"] = cut_into_parts(message["content"], images, unread, marks=marks, listed=shown)
    _check_order(messages, answers_required, record)
    check_grounding(messages, record.get("objects"))
    placed = place_images(messages, given, layout.leading, videos)
    _check_texts(messages)
    tools = read_tools(record.get("functions") if is_empty(record.get("tools")) else record["tools"])
    return Conversation(tuple(messages), tuple(placed), source, line, _metadata(record), tools)


def _checked_layout(
    record: Mapping[str, Any], has_image: bool, unread: Counter[str], chosen: Collection[str]
) -> Layout:
    """Return the layout of a record after checking its other keys. These are checked even if no layout is found, since
    they may say why.
    """
    try:
        layout = layout_of(record, has_image)
    except BadSample:
        check_keys(record, _COMMON, unread, chosen=chosen, has_image=has_image)
        raise
    check_keys(record, layout.keys, unread, chosen=chosen, has_image=has_image, asks=layout.asks)
    if trained_on(record, "the record") is False:
        raise BadSample("sample kept out of the loss", "its own weight, train or mask says so; leave the record out")
    return layout


def _listed(
    record: Mapping[str, Any],
    names: Sequence[str],
    read: Callable[[Any], list[ImageSource]],
    unread: Counter[str],
    chosen: Collection[str],
) -> list[ImageSource]:
    """Return the images or videos that a record lists, under the plural or the singular of ``names``."""
    keys = [key for key in names if key in chosen] or names
    found = [listed for key in keys if (listed := read(record.get(key)))]
    if len(found) == 2 and found[0] != found[1]:
        plural, singular = names
        remedy = f"{singular} and {plural}; write all under {plural}, or choose one with columns"
        raise BadSample("two keys say different things", remedy)
    unread.update(key for key in names if key not in keys and not is_empty(record.get(key)))
    return found[0] if found else []


def _with_system(system: Any, messages: list[RawMessage]) -> list[RawMessage]:
    """Return the messages, preceded by the record's own system message if it has one."""
    if is_empty(system):
        return messages
    if not isinstance(system, str):
        raise BadSample("system is not a text", repr(system)[:80])
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise BadSample("two system messages", "key 'system' and the first message; keep one")
        return messages
    return [_message("system", system), *messages]


def _check_order(messages: list[RawMessage], answers_required: bool, record: Mapping[str, Any]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise BadSample("system message is not the first", f"roles: {', '.join(roles)}")
    speakers = roles[1:] if roles[:1] == ["system"] else roles
    if "user" not in speakers:
        raise BadSample("no user message", f"roles: {', '.join(roles) or 'none'}")
    if speakers[0] != "user":
        raise BadSample(f"{speakers[0]} speaks before the user", f"roles: {', '.join(roles)}")
    if not answers_required:
        return
    if "assistant" not in speakers:
        keys = ", ".join(map(str, record))
        raise BadSample("no assistant answer", f"roles: {', '.join(roles)}; keys: {keys}; columns can name the answer")
    if all(message.get("supervised") is False for message in messages if message["role"] == "assistant"):
        raise BadSample("no answer to learn", "every assistant message is kept out of the loss")


def _check_texts(messages: list[dict[str, Any]]) -> None:
    for number, message in enumerate(messages, 1):
        try:
            (message_text(message) + message.get("reasoning_content", "")).encode()
        except UnicodeEncodeError as error:  # such as half of an escaped emoji: JSON accepts it, tokenizers do not
            raise BadSample("invalid Unicode", f"message {number}: {error}") from None
        has_image = any(part["type"] in ("image", "video") for part in message["content"])
        if message["role"] == "assistant" and not message_text(message) and "tool_calls" not in message:
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
