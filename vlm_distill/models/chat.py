"""Find the assistant's answers in a conversation rendered by any chat template, and mark their tokens.

Templates with a generation marker are rare, so none is needed. The conversation is rendered twice: as it is, and with
private-use characters around each answer's own text. These show what the template makes of an answer, even where it
trims it, puts something before it, or leaves its thought out.
"""

from __future__ import annotations

import difflib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.conversation import count_images, is_answer, split_thought, thought_parts
from data.errors import BadSample, UserError

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

#: Private-use characters that no tokenizer ever sees: around a thought, around a text, after a tool call's name, in
#: place of an image, and inside a control token that a user writes out.
THOUGHT, THOUGHT_END, TEXT, TEXT_END, CALL = "\U0010fff0", "\U0010fff1", "\U0010fff2", "\U0010fff3", "\U0010fff4"
IMAGE, BREAK = "\U0010fffd", "\U0010fffc"
PRIVATE = (THOUGHT, THOUGHT_END, TEXT, TEXT_END, CALL, BREAK, IMAGE)
_MARKS = re.compile(f"[{THOUGHT}{THOUGHT_END}{TEXT}{TEXT_END}{CALL}]")

_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\n*(?=\s*\S)")

#: Added tokens that frame an image, or a part of one, by their names in the families of Transformers.
_OF_IMAGES = re.compile(r"im(g|age)|vision|video|audio|tile|patch|row_\d", re.IGNORECASE)

#: Names that a template is given in any case.
_OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")


@dataclass(frozen=True)
class Span:
    """An answer in the rendered text, in characters.

    Attributes:
        start, stop: what is supervised, its end of turn aside.
        pieces: (number, start, stop) of its thought and of its text, as :func:`data.conversation.answer_pieces` numbers
            them.
        closed: whether the template ends a turn by a token of its own.
    """

    start: int
    stop: int
    pieces: tuple[tuple[int, int, int], ...]
    closed: bool = True

    def moved(self, shift: int) -> Span:
        """The same answer, so many characters later."""
        pieces = tuple((number, start + shift, stop + shift) for number, start, stop in self.pieces)
        return replace(self, start=self.start + shift, stop=self.stop + shift, pieces=pieces)


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around messages, found once by rendering a question and an answer.

    Attributes:
        opening: what opens the assistant's turn for generation; ``None``: could not be found.
        block: what stands between that opening and a plain answer, such as an empty thought; blanks do not count.
        closed: whether a special token ends the assistant's turn.
        reasoning: whether ``reasoning_content`` is shown.
        inline: whether a thought inside the content is known as one; ``False``: it is part of a plain answer.
        earlier: whether an answer looks the same when another question follows.
        control: the tokens that frame a conversation or an image.
        special: the contents of all special tokens.
    """

    opening: str | None = None
    block: str = ""
    closed: bool = True
    reasoning: bool = False
    inline: bool = True
    earlier: bool = True
    control: tuple[str, ...] = ()
    special: tuple[str, ...] = ()


def probe_frame(tokenizer: Any, render: Render) -> Frame:
    """Probe a template. One that refuses every probe gives a frame in which nothing is known."""
    added = list(tokenizer.added_tokens_decoder.values())
    special = tuple(token.content for token in added if token.special)
    control = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    control |= {token.content for token in added if _OF_IMAGES.search(token.content)}
    frame = Frame(special=special)
    # A template may want an image, or a system message.
    image = [{"type": "image"}, *_parts("a")]
    system = [{"role": "system", "content": _parts("s")}]
    for before in ([], system):
        for asked in (_parts("a"), image):
            question = [*before, {"role": "user", "content": asked}]
            try:
                frame, written = _probe(render, question, frame)
            except Exception:  # it refuses this probe; `rendered` reports what it refuses of the data
                continue
            control |= {token for token in special if token in written}
            return replace(frame, control=tuple(sorted(control)))
    return replace(frame, control=tuple(sorted(control)))


def _probe(render: Render, question: list[dict[str, Any]], frame: Frame) -> tuple[Frame, str]:
    """Return the frame that a question shows, and everything that was rendered."""
    answer = {"role": "assistant", "content": _parts("b")}
    shown = _Marked(render([*question, _marked(answer)], False))
    opened = render(question, True)
    places = dict(shown.marks)
    header = min(_common(opened, shown.text), places[TEXT])
    block, tail = shown.text[header : places[TEXT]], shown.text[places[TEXT_END] :]
    frame = replace(
        frame,
        opening=opened[_common(opened, render(question, False)) :],
        block=block if block.strip() else "",
        closed=tail.lstrip().startswith(frame.special),
        reasoning=_shows(render, question, {**answer, "reasoning_content": "c"}, THOUGHT),
        inline=not block.strip() or not _shows_after(render, question, block),
        earlier=_looks_alike(render, question, shown.text[: places[TEXT]]),
    )
    return frame, shown.text + opened


def _shows(render: Render, question: list[dict[str, Any]], answer: dict[str, Any], mark: str) -> bool:
    try:
        return mark in render([*question, _marked(answer)], False)
    except Exception:  # it refuses the key
        return False


def _shows_after(render: Render, question: list[dict[str, Any]], block: str) -> bool:
    """Whether a thought inside the content stands after what the template writes before a plain answer."""
    answer = {"role": "assistant", "content": _parts("<think>\nc\n</think>\n\nb")}
    try:
        before, shown, _ = render([*question, _marked(answer)], False).partition(THOUGHT)
    except Exception:  # it refuses such an answer
        return False
    return bool(shown) and before.removesuffix("<think>\n").endswith(block)


def _looks_alike(render: Render, question: list[dict[str, Any]], before: str) -> bool:
    """Whether an answer with a thought, or a plain one, looks the same when another question follows."""
    for answer in ("b", "<think>\nc\n</think>\n\nb"):
        turn = _marked({"role": "assistant", "content": _parts(answer)})
        again = {"role": "user", "content": _parts("d")}
        try:
            alone, followed = render([*question, turn], False), render([*question, turn, again], False)
        except Exception:  # it refuses a question without an answer
            return True
        if alone.partition(TEXT_END)[0] != followed.partition(TEXT_END)[0]:
            return False
    return True


def _parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


class _Marked:
    """A rendered text without its marks, and where these stood: (mark, characters before it)."""

    def __init__(self, text: str) -> None:
        self.marks: list[tuple[str, int]] = []
        pieces, last = [], 0
        for number, match in enumerate(_MARKS.finditer(text)):
            self.marks.append((match[0], match.start() - number))
            pieces.append(text[last : match.start()])
            last = match.end()
        self.text = "".join([*pieces, text[last:]])


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message with marks around its own text, inside the blanks that a template may trim."""
    if message["role"] != "assistant" or count_images((message,)):
        return message
    (before, thought, between, text) = thought_parts(message)
    content = before + _wrapped(thought, THOUGHT, THOUGHT_END) + between + _wrapped(text, TEXT, TEXT_END)
    marked = {**message, "content": _parts(content)}
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


def _last_mark(message: dict[str, Any]) -> str | None:
    """The mark that ends a message."""
    if count_images((message,)):
        return None
    if message.get("tool_calls"):
        return CALL
    thought, text = split_thought(message)
    if text:
        return TEXT_END
    return THOUGHT_END if thought else None


def _common(one: str, other: str) -> int:
    """The length of the longest common prefix."""
    # Bisection over slices: comparing them costs far less than comparing characters in Python.
    return bisect_right(range(min(len(one), len(other))), 0, key=lambda i: one[: i + 1] != other[: i + 1])


def plain_messages(messages: Sequence[dict[str, Any]], frame: Frame | None = None) -> list[dict[str, Any]]:
    """The messages as templates are given them: an answer's texts in one part, a call's arguments as an object.

    With the ``frame`` of a template that knows thoughts as ``reasoning_content`` alone, they go there.
    """
    plain = []
    for message in messages:
        kept = {key: value for key, value in message.items() if key != "supervised"}
        if message["role"] == "assistant" and not count_images((message,)):
            kept["content"] = _parts("".join(part["text"] for part in message["content"]))
            if frame is not None and frame.reasoning and not frame.inline:
                kept |= _without_thought(kept)
        if message.get("tool_calls"):
            kept["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        plain.append(kept)
    return plain


def _without_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message's content without its ``<think>…</think>``, and what that holds as ``reasoning_content``."""
    before, thought, _, text = thought_parts(message)
    if "<think>" in before:
        return {"content": _parts(text.lstrip("\n")), "reasoning_content": thought.strip("\n")}
    empty = _EMPTY_THOUGHT.match(text)
    return {"content": _parts(text[empty.end() :])} if empty else {}


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, which templates expect; servers send them as JSON."""
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            arguments = None
        if isinstance(arguments, dict):
            function["arguments"] = arguments
    return {**call, "function": function} if "function" in call else function


def find_answers(
    render: Render, messages: Sequence[dict[str, Any]], frame: Frame, learn_block: bool = False
) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the place of every supervised answer in it.

    An answer begins where the text departs from the template's opening for generation. What the template writes between
    that and a plain answer is part of the prompt. An answer with a thought is supervised from the opening on: the model
    has to write all of it. Where the final rendering leaves an earlier thought out, only what it shows is supervised.

    Args:
        render: the template.
        messages: ending with an answer, or with context after it.
        frame: of the template.
        learn_block: supervise what the template writes before a plain answer, too.

    Raises:
        BadSample: the template refuses the messages, or does not show an answer as it is.
    """
    plain = plain_messages(messages, frame)
    marked = [_marked(message) for message in plain]
    text = rendered(render, plain, False)
    shown = _Marked(rendered(render, marked, False))
    if shown.text != text:
        at = _common(shown.text, text)
        raise BadSample("chat template rewrites the answer", f"it depends on the answer at {text[at : at + 40]!r}")
    spans: list[Span] = []
    number, anchor = 0, 0
    for k, (message, (places, end)) in enumerate(zip(messages, _by_message(plain, shown.marks), strict=True)):
        if message["role"] != "assistant":
            continue
        if is_answer(message):
            _check_answer(message, frame)
            opening = _Marked(rendered(render, marked[:k], True))
            own = split_thought(message)[1]
            turn = _Turn(render, plain[k], own, marked, k, number, places, frame, learn_block)
            text, span = turn.located(text, anchor, opening)
            spans.append(span)
        anchor = max(anchor, end)
        number += 1
    return text, spans


def _check_answer(message: dict[str, Any], frame: Frame) -> None:
    if count_images((message,)):
        raise BadSample("image in an answer", "no model here writes images; mask the turn, or move the image")
    if _last_mark(message) in (None, THOUGHT_END):
        raise BadSample("empty answer")
    thinks = frame.opening is not None and "<think>" in frame.opening
    if message.get("reasoning_content") and not frame.reasoning and not thinks:
        raise BadSample(
            "chat template ignores reasoning_content", "give a chat_template that shows it, or write it as <think>"
        )


def _by_message(
    messages: Sequence[dict[str, Any]], marks: Iterable[tuple[str, int]]
) -> list[tuple[dict[str, int], int]]:
    """Where each message's marks stand, and the last of them; an answer that is missing or there twice is refused."""
    waiting, found = list(marks), list[tuple[dict[str, int], int]]()
    for message in messages:
        places: dict[str, int] = {}
        last = _last_mark(message) if message["role"] == "assistant" else None
        while last is not None and last not in places:
            if not waiting:
                raise BadSample("chat template drops an answer", _named(message))
            mark, place = waiting.pop(0)
            if mark in places:
                raise BadSample("chat template repeats an answer", _named(message))
            places[mark] = place
        # Templates also write a call's name in its header, or in the header of the tool's reply.
        end = max(places.values(), default=0)
        while last == CALL and waiting and waiting[0][0] == CALL:
            end = waiting.pop(0)[1]
        found.append((places, end))
    if waiting:
        raise BadSample("chat template repeats an answer")
    return found


def _named(message: Mapping[str, Any]) -> str:
    """The beginning of an answer's text, or its tool calls."""
    called = ", ".join(str(call.get("function", call)["name"]) for call in message.get("tool_calls", ()))
    return f"tool calls: {called}"[:80] if called else repr(split_thought(message)[1][:40])


@dataclass
class _Turn:
    """The answer in message ``k``, the ``number``-th of the conversation, and where its marks stand.

    ``own`` is its text as the data has it, of which the template may be given less.
    """

    render: Render
    message: dict[str, Any]
    own: str
    marked: list[dict[str, Any]]
    k: int
    number: int
    places: dict[str, int]
    frame: Frame
    learn_block: bool

    def located(self, text: str, anchor: int, opening: _Marked) -> tuple[str, Span]:
        """Return the text, changed where it hides the thought of the last answer, and the answer's place.

        Args:
            text: the rendered conversation.
            anchor: where the answer before this one ends in it.
            opening: the messages before this answer, opened for generation.
        """
        since = opening.text[opening.marks[-1][1] if opening.marks else 0 :]
        header = anchor + _common(since, text[anchor:])
        rest = since[header - anchor :]
        first = min(self.places.values())
        if split_thought(self.message)[0] and THOUGHT not in self.places and self._is_last():
            return self._reopened(text, header, rest)
        if rest and (header > first or self.frame.opening is None or len(rest) > len(self.frame.opening)):
            header = first  # the two have parted before the opening, or by chance run on into the answer
        closed = self.frame.closed or CALL in self.places
        return text, Span(self._start(text, header, first), self._stop(text), self._pieces(), closed)

    def _is_last(self) -> bool:
        return not any(message["role"] in ("user", "assistant") for message in self.marked[self.k + 1 :])

    def _start(self, text: str, header: int, first: int) -> int:
        block = self.frame.block
        if self.learn_block:
            return header
        if THOUGHT in self.places:
            plain = text.startswith(block, header) and header + len(block) <= self.places[THOUGHT]
            return header + len(block) * plain
        if TEXT not in self.places or (CALL in self.places and first == self.places[CALL]):
            return header + len(block) * text.startswith(block, header)
        between = text[header:first]
        if not between.strip():
            return header
        if between.startswith(block) and not between[len(block) :].strip():
            return header + len(block)
        return first

    def _stop(self, text: str) -> int:
        if CALL in self.places:
            return self._end_of_calls(text)
        stop = self.places[TEXT_END]
        content = self.message["content"][0]["text"]
        blanks = content[len(content.rstrip()) :]
        return stop + len(blanks) * text.startswith(blanks, stop)

    def _end_of_calls(self, text: str) -> int:
        """Where the tool calls end: before the last special token that the template writes when nothing follows."""
        alone = _Marked(rendered(self.render, self.marked[: self.k + 1], False))
        earlier = rendered(self.render, self.marked[: self.k], True).count(CALL)
        first = [place for mark, place in alone.marks if mark == CALL][earlier]
        call = self.places[CALL]
        written = text[call : call + _common(alone.text[first:], text[call:])]
        closing = [written.rfind(token) for token in self.frame.special if token in written]
        end = max(closing) if closing else len(written)
        return call + len(written[:end].rstrip())

    def _pieces(self) -> tuple[tuple[int, int, int], ...]:
        """Places of thought and text; a text whose beginning the template drops is placed by its end."""
        pieces = []
        if THOUGHT in self.places and THOUGHT_END in self.places:
            pieces.append((2 * self.number, self.places[THOUGHT], self.places[THOUGHT_END]))
        if TEXT_END in self.places:
            stop = self.places[TEXT_END]
            shown = TEXT in self.places and split_thought(self.message)[1] == self.own
            start = self.places[TEXT] if shown else stop - len(self.own)
            pieces.append((2 * self.number + 1, start, stop))
        else:
            pieces.append((2 * self.number + 1, self.places[CALL], self.places[CALL]))
        return tuple(pieces)

    def _reopened(self, text: str, header: int, rest: str) -> tuple[str, Span]:
        """The text with the answer written after the opening, as the model does, where a template hides its thought."""
        opened = text[:header] + rest
        if not opened.rstrip().endswith("<think>") or CALL in self.places:
            raise BadSample("chat template drops the thought", "give a chat_template that shows it")
        _, thought, between, answer = thought_parts(self.message)
        if self.message.get("reasoning_content"):
            thought, between = self.message["reasoning_content"] + "\n", "</think>\n\n"
        if opened[-1:] == "\n":
            thought = thought.removeprefix("\n")
        after = self.places[TEXT_END]
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


def whole_thought(answer: str) -> str:
    """Return a generated answer with the ``<think>`` that its prompt ended with, if it only closes a thought."""
    before, closed, _ = answer.partition("</think>")
    return f"<think>\n{answer}" if closed and "<think>" not in before else answer


def rendered(render: Render, messages: Sequence[dict[str, Any]], generation: bool) -> str:
    """The text of a conversation; a template that refuses it makes a ``BadSample``."""
    try:
        return render(messages, generation)
    except Exception as error:  # Jinja's errors, and whatever a template raises to refuse a conversation
        raise BadSample("chat template refuses the conversation", first_line(error)[:120]) from error


def mark_tokens(
    text: str, offsets: Sequence[tuple[int, int]], ids: Sequence[int], spans: Sequence[Span], special: set[int]
) -> tuple[list[bool], list[bool]]:
    """Return which tokens are supervised, and which of those are end tokens.

    A token is supervised when it lies in an answer, or between its text and its end token. The end token is the first
    token after the answer's text, blanks aside, if it is a special one and the template ends turns by one. A token that
    runs from the prompt into the answer belongs to the answer only if its part of the prompt is blank.

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
            elif ids[token] in special and span.closed:
                ends[token] = True
                for i in [*trailing, token]:
                    supervised[i] = True
                token += 1
                break
            elif ids[token] in special or text[a:b].strip():
                break
            else:
                trailing.append(token)
            token += 1
    return supervised, ends


def token_places(
    text: str,
    offsets: Sequence[tuple[int, int]],
    supervised: Sequence[bool],
    ends: Sequence[bool],
    spans: Sequence[Span],
) -> Tensor:
    """Return where the supervised tokens stand in the answers' own texts.

    Args:
        text: the rendered text.
        offsets: of each token, characters of the rendered text.
        supervised, ends: from :func:`mark_tokens`.
        spans: from :func:`find_answers`.

    Returns:
        ``Encoded.spans``, int64 ``[n, 3]``.
    """
    places = []
    answer = 0
    for (a, b), marked, end in zip(offsets, supervised, ends, strict=True):
        if not marked:
            continue
        while answer + 1 < len(spans) and spans[answer + 1].start < b:
            answer += 1
        number, start, own = _piece_of(text, a, b, spans[answer].pieces)
        # An end token belongs to the text that it ends, whatever the template writes between them.
        number = spans[answer].pieces[-1][0] if end else number if own else -1 - number
        places.append((number, a - start, b - start))
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 3)


def _piece_of(text: str, a: int, b: int, pieces: Sequence[tuple[int, int, int]]) -> tuple[int, int, bool]:
    """The piece that a token belongs to, or stands next to: its number, its start, and whether the token is its own."""
    for number, start, stop in pieces:
        overlaps = a < stop and b > start
        blank_before = b <= start and not text[a:start].strip()
        blank_after = a >= stop and not text[stop:b].strip()
        if overlaps or blank_before or blank_after:
            return number, start, True
    number, start, _ = next((piece for piece in pieces if b <= piece[1]), pieces[-1])
    return number, start, False


def held(tokens: Sequence[str], texts: Sequence[str]) -> str | None:
    """The first of the tokens that stands in one of the texts."""
    return next((token for token in tokens if any(token in text for text in texts)), None)


def written_texts(message: Mapping[str, Any]) -> list[str]:
    """Every text of a message that a template renders. Its parts are joined, as the template joins them."""
    texts = ["".join(part["text"] for part in message["content"] if part["type"] == "text")]
    texts += [str(message[key]) for key in ("reasoning_content", "name") if message.get(key)]
    if message.get("tool_calls"):
        texts.append(json.dumps(message["tool_calls"], ensure_ascii=False))
    return texts


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of every token the tokenizer holds for special, the end token above all."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def with_arguments(template: Any, arguments: Mapping[str, Any], where: str) -> Any:
    """Return a chat template in which these arguments have these values, unless it is given others.

    They become part of the template, so that they go wherever it goes: into caches' names and exported students.

    Args:
        template: a Jinja template, or several by name.
        arguments: as :class:`~vlm_distill.config.sections.ModelSection` has them.
        where: whose they are, for errors.

    Raises:
        UserError: there is no template, or it does not read an argument.
    """
    if not arguments:
        return template
    if template is None:
        raise UserError(f"{where}: this model has no chat template; leave it out")
    if isinstance(template, dict):
        return {name: with_arguments(one, arguments, where) for name, one in template.items()}
    read = set(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"{[{%].*?[%}]}", template, re.DOTALL))))
    defaults = ""
    for name, value in arguments.items():
        if name in _OWN_NAMES:
            raise UserError(f"{where}: '{name}' is what every chat template is given; leave it out")
        if name not in read:
            near = difflib.get_close_matches(name, read, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "leave it out"
            raise UserError(f"{where}: the chat template does not read '{name}'; {hint}")
        defaults += f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
    return defaults + template


def _literal(value: Any) -> str:
    """A value of YAML as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)
