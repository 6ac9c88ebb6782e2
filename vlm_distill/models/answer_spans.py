"""Find the assistant's answers in a conversation rendered by any chat template.

Templates with a generation marker are rare, so none is needed. The conversation is rendered twice: as it is, and with
private-use characters around each answer's own text. These show what the template makes of an answer, even if it trims
it, puts something before it, or leaves its thought out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.conversation import count_images, is_answer, split_thought, thought_parts
from data.errors import BadSample

from .chat import plain_messages, rendered
from .template_frame import Frame
from .template_marks import (
    CALL,
    TEXT,
    TEXT_END,
    THOUGHT,
    THOUGHT_END,
    MarkedText,
    Render,
    common_prefix,
    last_mark,
    mark_answer,
)


@dataclass(frozen=True)
class Span:
    """An answer in the rendered text, in characters.

    Attributes:
        start, stop: the supervised text, without the end of turn.
        pieces: (number, start, stop) of its thought and of its text, numbered by
            :func:`data.conversation.answer_pieces`.
        closed: whether the template ends the turn with a token of its own.
    """

    start: int
    stop: int
    pieces: tuple[tuple[int, int, int], ...]
    closed: bool = True

    def moved(self, shift: int) -> Span:
        """Return the same answer, ``shift`` characters later."""
        pieces = tuple((number, start + shift, stop + shift) for number, start, stop in self.pieces)
        return replace(self, start=self.start + shift, stop=self.stop + shift, pieces=pieces)


def find_answers(
    render: Render, messages: Sequence[dict[str, Any]], frame: Frame, learn_answer_prefix: bool = False
) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the span of every supervised answer in it.

    An answer begins where the text first differs from the generation prompt. What the template writes between that
    prompt and a plain answer belongs to the prompt. An answer with a thought is supervised from the opening on,
    since the model must write all of it. If the rendering drops an earlier thought, only what it shows is supervised.

    Args:
        render: the template.
        messages: ending with an answer, or with context after it.
        frame: of the template.
        learn_answer_prefix: also supervise what the template writes before a plain answer.

    Raises:
        BadSample: the template refuses the messages, or does not show an answer as it is.
    """
    plain = plain_messages(messages, frame)
    marked = [mark_answer(message) for message in plain]
    text = rendered(render, plain, False)
    shown = MarkedText(rendered(render, marked, False))
    if shown.text != text:
        at = common_prefix(shown.text, text)
        raise BadSample(
            "chat template rewrites the answer", f"the text around it changes with the answer: {text[at : at + 40]!r}"
        )
    spans: list[Span] = []
    number, anchor = 0, 0
    for k, (message, (marks, end)) in enumerate(zip(messages, _by_message(plain, shown.marks), strict=True)):
        if message["role"] != "assistant":
            continue
        if is_answer(message):
            _check_answer(message, frame)
            opening = MarkedText(rendered(render, marked[:k], True))
            own = split_thought(message)[1]
            turn = _Turn(render, plain[k], own, marked, k, number, marks, frame, learn_answer_prefix)
            text, span = turn.located(text, anchor, opening)
            spans.append(span)
        anchor = max(anchor, end)
        number += 1
    return text, spans


def _check_answer(message: dict[str, Any], frame: Frame) -> None:
    if count_images((message,)):
        raise BadSample("image in an answer", "no model here writes images; mask the turn, or move the image")
    if last_mark(message) in (None, THOUGHT_END):
        raise BadSample("empty answer")
    thinks = frame.opening is not None and "<think>" in frame.opening
    if message.get("reasoning_content") and not frame.reasoning and not thinks:
        raise BadSample(
            "chat template ignores reasoning_content", "give a chat_template that shows it, or write it as <think>"
        )


def _by_message(
    messages: Sequence[dict[str, Any]], marks: Iterable[tuple[str, int]]
) -> list[tuple[dict[str, int], int]]:
    """Return the position of each message's marks, and of its last one. Refuse a missing or repeated answer."""
    waiting, found = list(marks), list[tuple[dict[str, int], int]]()
    for message in messages:
        own: dict[str, int] = {}
        last = last_mark(message) if message["role"] == "assistant" else None
        while last is not None and last not in own:
            if not waiting:
                raise BadSample("chat template drops an answer", _named(message))
            mark, place = waiting.pop(0)
            if mark in own:
                raise BadSample("chat template repeats an answer", _named(message))
            own[mark] = place
        # Templates may write a call's name again, in its header or in the header of the tool's reply.
        end = max(own.values(), default=0)
        while last == CALL and waiting and waiting[0][0] == CALL:
            end = waiting.pop(0)[1]
        found.append((own, end))
    if waiting:
        raise BadSample("chat template repeats an answer")
    return found


def _named(message: Mapping[str, Any]) -> str:
    """Return the beginning of an answer's text, or its tool calls."""
    called = ", ".join(str(call.get("function", call)["name"]) for call in message.get("tool_calls", ()))
    return f"tool calls: {called}"[:80] if called else repr(split_thought(message)[1][:40])


@dataclass
class _Turn:
    """The answer in message ``k``, the ``number``-th answer of the conversation, and the positions of its marks.

    ``own`` is its text in the data; the template may be given less of it.
    """

    render: Render
    message: dict[str, Any]
    own: str
    marked: list[dict[str, Any]]
    k: int
    number: int
    marks: dict[str, int]
    frame: Frame
    learn_answer_prefix: bool

    def located(self, text: str, anchor: int, opening: MarkedText) -> tuple[str, Span]:
        """Return the answer's span and the text, which is changed if it hides the last answer's thought.

        Args:
            text: the rendered conversation.
            anchor: where the previous answer ends in it.
            opening: the messages before this answer, opened for generation.
        """
        since = opening.text[opening.marks[-1][1] if opening.marks else 0 :]
        header = anchor + common_prefix(since, text[anchor:])
        rest = since[header - anchor :]
        first = min(self.marks.values())
        if split_thought(self.message)[0] and THOUGHT not in self.marks and self._is_last():
            return self._reopened(text, header, rest)
        if rest and (header > first or self.frame.opening is None or len(rest) > len(self.frame.opening)):
            header = first  # the texts diverge before the generation prompt, or agree into the answer by chance
        closed = self.frame.closed or CALL in self.marks
        return text, Span(self._start(text, header, first), self._stop(text), self._pieces(), closed)

    def _is_last(self) -> bool:
        return not any(message["role"] in ("user", "assistant") for message in self.marked[self.k + 1 :])

    def _start(self, text: str, header: int, first: int) -> int:
        block = self.frame.answer_prefix
        if self.learn_answer_prefix:
            return header
        if THOUGHT in self.marks:
            plain = text.startswith(block, header) and header + len(block) <= self.marks[THOUGHT]
            return header + len(block) * plain
        if TEXT not in self.marks or (CALL in self.marks and first == self.marks[CALL]):
            return header + len(block) * text.startswith(block, header)
        between = text[header:first]
        if not between.strip():
            return header
        if between.startswith(block) and not between[len(block) :].strip():
            return header + len(block)
        return first

    def _stop(self, text: str) -> int:
        if CALL in self.marks:
            return self._end_of_calls(text)
        stop = self.marks[TEXT_END]
        content = self.message["content"][0]["text"]
        blanks = content[len(content.rstrip()) :]
        return stop + len(blanks) * text.startswith(blanks, stop)

    def _end_of_calls(self, text: str) -> int:
        """Return where the tool calls end: before the last special token that is written when nothing follows."""
        alone = MarkedText(rendered(self.render, self.marked[: self.k + 1], False))
        earlier = rendered(self.render, self.marked[: self.k], True).count(CALL)
        first = [place for mark, place in alone.marks if mark == CALL][earlier]
        call = self.marks[CALL]
        written = text[call : call + common_prefix(alone.text[first:], text[call:])]
        closing = [written.rfind(token) for token in self.frame.special if token in written]
        end = max(closing) if closing else len(written)
        return call + len(written[:end].rstrip())

    def _pieces(self) -> tuple[tuple[int, int, int], ...]:
        """Return thought and text with their positions; a text whose beginning is dropped is placed by its end."""
        pieces = []
        if THOUGHT in self.marks and THOUGHT_END in self.marks:
            pieces.append((2 * self.number, self.marks[THOUGHT], self.marks[THOUGHT_END]))
        if TEXT_END in self.marks:
            stop = self.marks[TEXT_END]
            shown = TEXT in self.marks and split_thought(self.message)[1] == self.own
            start = self.marks[TEXT] if shown else stop - len(self.own)
            pieces.append((2 * self.number + 1, start, stop))
        else:
            pieces.append((2 * self.number + 1, self.marks[CALL], self.marks[CALL]))
        return tuple(pieces)

    def _reopened(self, text: str, header: int, rest: str) -> tuple[str, Span]:
        """Write the answer after the opening, as the model does, if the template hides its thought."""
        opened = text[:header] + rest
        if not opened.rstrip().endswith("<think>") or CALL in self.marks:
            raise BadSample("chat template drops the thought", "give a chat_template that shows it")
        _, thought, between, answer = thought_parts(self.message)
        if self.message.get("reasoning_content"):
            thought, between = self.message["reasoning_content"] + "\n", "</think>\n\n"
        if opened[-1:] == "\n":
            thought = thought.removeprefix("\n")
        after = self.marks[TEXT_END]
        lead = len(thought) - len(thought.lstrip())
        begin = len(opened) + len(thought) + len(between)
        core = len(answer.strip())
        start = begin + len(answer) - len(answer.lstrip())
        pieces = (
            (2 * self.number, len(opened) + lead, len(opened) + len(thought.rstrip())),
            (2 * self.number + 1, start, start + core),
        )
        answer = answer[: len(answer.rstrip())]
        written = opened + thought + between + answer
        return written + text[after:], Span(len(opened), len(written), pieces, self.frame.closed)
