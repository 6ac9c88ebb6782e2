"""Messages as chat templates take them: their form, their texts, and rendering."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data.conversation import count_images, thought_parts
from data.errors import BadSample, first_line

from .template_frame import Frame
from .template_marks import Render, text_parts

#: Used for tokenizers that come without a template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% else %}Assistant: {{ message['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\n*(?=\s*\S)")


def plain_messages(messages: Sequence[dict[str, Any]], frame: Frame | None = None) -> list[dict[str, Any]]:
    """Return messages in the form that templates get: an answer's texts in one part, a call's arguments as an object.

    With the ``frame`` of a template that recognises thoughts only as ``reasoning_content``, thoughts are moved there.
    """
    plain = []
    for message in messages:
        kept = {key: value for key, value in message.items() if key != "supervised"}
        if message["role"] == "assistant" and not count_images((message,)):
            kept["content"] = text_parts("".join(part["text"] for part in message["content"]))
            if frame is not None and frame.reasoning and not frame.inline:
                kept |= _without_thought(kept)
        if message.get("tool_calls"):
            kept["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        plain.append(kept)
    return plain


def _without_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message's content without its ``<think>…</think>``, and the thought as ``reasoning_content``."""
    before, thought, _, text = thought_parts(message)
    if "<think>" in before:
        return {"content": text_parts(text.lstrip("\n")), "reasoning_content": thought.strip("\n")}
    empty = _EMPTY_THOUGHT.match(text)
    return {"content": text_parts(text[empty.end() :])} if empty else {}


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as templates expect; servers send them as JSON text."""
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            arguments = None
        if isinstance(arguments, dict):
            function["arguments"] = arguments
    return {**call, "function": function} if "function" in call else function


def whole_thought(answer: str) -> str:
    """Return a generated answer with the ``<think>`` that its prompt ended with, if it only closes a thought."""
    before, closed, _ = answer.partition("</think>")
    return f"<think>\n{answer}" if closed and "<think>" not in before else answer


def rendered(render: Render, messages: Sequence[dict[str, Any]], generation: bool) -> str:
    """Render a conversation to text. Raise ``BadSample`` if the template refuses it."""
    try:
        return render(messages, generation)
    except Exception as error:  # Jinja's errors, and whatever a template itself raises
        raise BadSample("chat template refuses the conversation", first_line(error)[:120]) from error


def held(tokens: Sequence[str], texts: Sequence[str]) -> str | None:
    """Return the first of the tokens that occurs in one of the texts."""
    for token in tokens:
        if any(token in text for text in texts):
            return token
    return None


def written_texts(message: Mapping[str, Any]) -> list[str]:
    """Return every text of a message that a template renders; parts are joined, as the template joins them."""
    texts = ["".join(part["text"] for part in message["content"] if part["type"] == "text")]
    texts += [str(message[key]) for key in ("reasoning_content", "name") if message.get(key)]
    if message.get("tool_calls"):
        texts.append(json.dumps(message["tool_calls"], ensure_ascii=False))
    return texts


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all tokens that the tokenizer treats as special."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
