"""Finds the assistant's answers in a conversation rendered by any chat template, and marks their tokens.

Templates with a generation marker are rare, so none is needed: rendering the conversation up to each answer shows where
that answer begins, and its own text shows where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.conversation import message_text
from data.errors import BadSample

from .common import first_line

#: Messages and ``add_generation_prompt`` to text.
Render = Callable[[Sequence[dict[str, Any]], bool], str]

#: For tokenizers that come without a template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% else %}Assistant: {{ message['content'] }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Span:
    """An answer in the rendered text, in characters.

    It begins at ``start``, blanks that the template writes before its own text included, which goes from ``text`` to
    ``stop``.
    """

    start: int
    text: int
    stop: int


def find_answers(render: Render, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
    """The rendered conversation and the place of every assistant answer in it.

    Raises:
        BadSample: the template refuses the messages, rewrites an answer, or renders earlier turns differently once
            later ones follow, so that no place in the text is the answer the model would have given.
    """
    text = rendered(render, messages, False)
    spans: list[Span] = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = message_text(message)
        opening = rendered(render, messages[:k], True)
        # Some templates open a turn for generation as they never write it in a history: then the answer is sought.
        start = len(opening) if text.startswith(opening) else len(rendered(render, messages[:k], False))
        begin = text.find(answer, start)
        upto = rendered(render, messages[: k + 1], False)
        if begin < 0 or upto.find(answer, start) < 0:
            raise BadSample("chat template rewrites the answer", repr(answer[:40]))
        stop = begin + len(answer)
        if text[:stop] != upto[:stop]:
            raise BadSample("chat template changes earlier turns", f"turn {k + 1}")
        if text[start:begin].strip():
            if text.startswith(opening):
                raise BadSample("chat template rewrites the answer", f"writes {text[start:begin][:40]!r} before it")
            start = begin
        spans.append(Span(start, begin, stop))
    return text, spans


def rendered(render: Render, messages: Sequence[dict[str, Any]], generation: bool) -> str:
    """The text of a conversation; a template that refuses it makes a ``BadSample``."""
    try:
        return render(messages, generation)
    except Exception as error:  # Jinja's errors, and whatever a template raises to refuse a conversation
        raise BadSample("chat template refuses the conversation", first_line(error)[:120]) from error


def mark_tokens(
    text: str, offsets: Sequence[tuple[int, int]], ids: Sequence[int], spans: Sequence[Span], special: set[int]
) -> tuple[list[bool], list[bool]]:
    """Which tokens are supervised, and which of those are end tokens.

    A token is supervised when it lies in an answer, or between its text and its end token. The end token is the first
    token after the answer's text, blanks aside, if it is a special one. A token that runs from the prompt into the
    answer belongs to the answer only if its part of the prompt is blank.

    Args:
        text: the rendered conversation.
        offsets: of each token, characters of ``text``.
        ids: token ids.
        spans: from :func:`find_answers`.
        special: ids of special tokens.
    """
    supervised = [False] * len(ids)
    ends = [False] * len(ids)
    token = 0
    for span in spans:
        while token < len(ids) and offsets[token][1] <= span.start:
            token += 1
        trailing: list[int] = []
        while token < len(ids):
            a, b = offsets[token]
            if a < span.start and text[a : span.start].strip():
                token += 1
                continue
            if a < span.stop:
                supervised[token] = True
            elif ids[token] in special:
                ends[token] = True
                for i in [*trailing, token]:
                    supervised[i] = True
                token += 1
                break
            elif text[a:b].strip():
                break
            else:
                trailing.append(token)
            token += 1
    return supervised, ends


def token_places(offsets: Sequence[tuple[int, int]], supervised: Sequence[bool], spans: Sequence[Span]) -> Tensor:
    """Where the supervised tokens stand in the answers' own texts.

    Args:
        offsets: of each token, characters of the rendered text.
        supervised: from :func:`mark_tokens`.
        spans: from :func:`find_answers`.

    Returns:
        ``Encoded.places``, int64 ``[n, 3]``.
    """
    places = []
    answer = 0
    for (a, b), marked in zip(offsets, supervised, strict=True):
        if marked:
            while answer + 1 < len(spans) and spans[answer + 1].start < b:
                answer += 1
            places.append((answer, a - spans[answer].text, b - spans[answer].text))
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 3)


def control_tokens(tokenizer: Any, render: Render) -> tuple[str, ...]:
    """The special tokens that frame a conversation: start and end of a text, and those that the template writes.

    Read from data, one of them would end a turn or begin one. Others, such as those around a box, are words.
    """
    parts = {"user": "a", "assistant": "b"}
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in parts.items()]
    try:
        frame = render(messages, False) + render(messages[:1], True)
    except Exception:  # a template that wants an image or a system prompt; `rendered` tells what it refuses
        frame = ""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    written = {token for token in special if token in frame}
    return tuple(sorted(written | {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}))


def held(tokens: Sequence[str], texts: Sequence[str]) -> str | None:
    """The first of the tokens that stands in one of the texts."""
    return next((token for token in tokens if any(token in text for text in texts)), None)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of every token the tokenizer holds for special, the end token above all."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
