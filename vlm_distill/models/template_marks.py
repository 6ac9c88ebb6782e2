"""Private-use characters that mark thoughts, texts and tool calls through the rendering of a chat template."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from data.conversation import count_images, split_thought, thought_parts

#: Renders messages to text; the second argument is ``add_generation_prompt``.
Render = Callable[[Sequence[dict[str, Any]], bool], str]
#: Private-use characters that no tokenizer ever sees: around a thought, around a text, after a tool call's name, in
#: place of an image, and inside a control token that a user wrote out.
THOUGHT, THOUGHT_END, TEXT, TEXT_END, CALL = "\U0010fff0", "\U0010fff1", "\U0010fff2", "\U0010fff3", "\U0010fff4"
IMAGE, BREAK = "\U0010fffd", "\U0010fffc"
PRIVATE = (THOUGHT, THOUGHT_END, TEXT, TEXT_END, CALL, BREAK, IMAGE)
_MARKS = re.compile(f"[{THOUGHT}{THOUGHT_END}{TEXT}{TEXT_END}{CALL}]")


def text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


class MarkedText:
    """A rendered text without its marks, and where each was: (mark, number of characters before it)."""

    def __init__(self, text: str) -> None:
        self.marks: list[tuple[str, int]] = []
        pieces, last = [], 0
        for number, match in enumerate(_MARKS.finditer(text)):
            self.marks.append((match[0], match.start() - number))
            pieces.append(text[last : match.start()])
            last = match.end()
        self.text = "".join([*pieces, text[last:]])


def mark_answer(message: dict[str, Any]) -> dict[str, Any]:
    """Mark an assistant message's own text, inside the blanks that a template may trim; return others as they are."""
    if message["role"] != "assistant" or count_images((message,)):
        return message
    (before, thought, between, text) = thought_parts(message)
    content = before + _wrapped(thought, THOUGHT, THOUGHT_END) + between + _wrapped(text, TEXT, TEXT_END)
    marked = {**message, "content": text_parts(content)}
    if message.get("reasoning_content"):
        marked["reasoning_content"] = _wrapped(message["reasoning_content"], THOUGHT, THOUGHT_END)
    if message.get("tool_calls"):
        *calls, last = message["tool_calls"]
        function = last.get("function", last)
        named = {**function, "name": f"{function['name']}{CALL}"}
        marked["tool_calls"] = [*calls, {**last, "function": named} if "function" in last else named]
    return marked


def _wrapped(text: str, start: str, stop: str) -> str:
    core = text.strip()
    if not core:
        return text
    lead = len(text) - len(text.lstrip())
    return text[:lead] + start + core + stop + text[lead + len(core) :]


def last_mark(message: dict[str, Any]) -> str | None:
    """Return the mark that ends a message."""
    if count_images((message,)):
        return None
    if message.get("tool_calls"):
        return CALL
    thought, text = split_thought(message)
    if text:
        return TEXT_END
    return THOUGHT_END if thought else None


def common_prefix(one: str, other: str) -> int:
    """Return the length of the longest common prefix."""
    # Bisection over slices: far cheaper than comparing single characters in Python.
    return bisect_right(range(min(len(one), len(other))), 0, key=lambda i: one[: i + 1] != other[: i + 1])
