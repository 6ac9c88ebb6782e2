"""Probe a chat template: what it writes around messages, and what it does to thoughts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .families import IMAGE_TOKENS
from .template_marks import TEXT, TEXT_END, THOUGHT, MarkedText, Render, common_prefix, mark_answer, text_parts


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around messages, found once by rendering a question and an answer.

    Attributes:
        opening: the text that opens the assistant's turn for generation; ``None`` if it was not found.
        answer_prefix: the text between that opening and a plain answer, such as an empty thought; blanks do not count.
        closed: whether a special token ends the assistant's turn.
        reasoning: whether ``reasoning_content`` is shown.
        inline: whether a thought inside the content is recognised; ``False``: it is treated as part of a plain answer.
        earlier: whether an answer is rendered the same when another question follows.
        control: the tokens that frame a conversation or an image.
        special: the contents of all special tokens.
    """

    opening: str | None = None
    answer_prefix: str = ""
    closed: bool = True
    reasoning: bool = False
    inline: bool = True
    earlier: bool = True
    control: tuple[str, ...] = ()
    special: tuple[str, ...] = ()


def probe_frame(tokenizer: Any, render: Render) -> Frame:
    """Probe a template. One that refuses every probe gives a frame that knows nothing."""
    added = list(tokenizer.added_tokens_decoder.values())
    special = tuple(token.content for token in added if token.special)
    control = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    control |= {token.content for token in added if IMAGE_TOKENS.search(token.content)}
    frame = Frame(special=special)
    # A template may require an image or a system message.
    image = [{"type": "image"}, *text_parts("a")]
    system = [{"role": "system", "content": text_parts("s")}]
    for before in ([], system):
        for asked in (text_parts("a"), image):
            question = [*before, {"role": "user", "content": asked}]
            try:
                frame, written = _probe(render, question, frame)
            except Exception:  # it refuses this probe; `rendered` reports a refusal of real data
                continue
            control |= {token for token in special if token in written}
            return replace(frame, control=tuple(sorted(control)))
    return replace(frame, control=tuple(sorted(control)))


def _probe(render: Render, question: list[dict[str, Any]], frame: Frame) -> tuple[Frame, str]:
    """Return the frame found by a question, and everything that was rendered."""
    answer = {"role": "assistant", "content": text_parts("b")}
    shown = MarkedText(render([*question, mark_answer(answer)], False))
    opened = render(question, True)
    places = dict(shown.marks)
    header = min(common_prefix(opened, shown.text), places[TEXT])
    block, tail = shown.text[header : places[TEXT]], shown.text[places[TEXT_END] :]
    frame = replace(
        frame,
        opening=opened[common_prefix(opened, render(question, False)) :],
        answer_prefix=block if block.strip() else "",
        closed=tail.lstrip().startswith(frame.special),
        reasoning=_shows(render, question, {**answer, "reasoning_content": "c"}, THOUGHT),
        inline=not block.strip() or not _shows_after(render, question, block),
        earlier=_looks_alike(render, question, shown.text[: places[TEXT]]),
    )
    return frame, shown.text + opened


def _shows(render: Render, question: list[dict[str, Any]], answer: dict[str, Any], mark: str) -> bool:
    try:
        return mark in render([*question, mark_answer(answer)], False)
    except Exception:  # it refuses the key
        return False


def _shows_after(render: Render, question: list[dict[str, Any]], block: str) -> bool:
    """Return whether a thought inside the content comes after the template's own text before a plain answer."""
    answer = {"role": "assistant", "content": text_parts("<think>\nc\n</think>\n\nb")}
    try:
        before, shown, _ = render([*question, mark_answer(answer)], False).partition(THOUGHT)
    except Exception:  # it refuses such an answer
        return False
    return bool(shown) and before.removesuffix("<think>\n").endswith(block)


def _looks_alike(render: Render, question: list[dict[str, Any]], before: str) -> bool:
    """Return whether answers, with a thought and without, are rendered the same when another question follows."""
    for answer in ("b", "<think>\nc\n</think>\n\nb"):
        turn = mark_answer({"role": "assistant", "content": text_parts(answer)})
        again = {"role": "user", "content": text_parts("d")}
        try:
            alone, followed = render([*question, turn], False), render([*question, turn, again], False)
        except Exception:  # it refuses a question without an answer
            return True
        if alone.partition(TEXT_END)[0] != followed.partition(TEXT_END)[0]:
            return False
    return True
