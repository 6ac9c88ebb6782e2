"""Put a row's question into words: named prompts, templates, and the places of images."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.conversation import ImageSource
from data.errors import BadSample, UserError

from .scoring.cells import literal
from .scoring.multiple_choice_vlmevalkit import choices_of

Row = Mapping[str, Any]

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
_IMAGE_TAG = re.compile(r"<image (\d+)>")


def options(row: Row) -> dict[str, str]:
    """Return the options by letter: the columns A to Z that are not empty."""
    return {letter: str(text) for letter, text in choices_of(row).items()}


def as_list(cell: Any) -> list[Any] | None:
    """Return the list that a cell holds, as a value or as text; ``None`` for any other cell."""
    if isinstance(cell, str) and cell.startswith("[") and cell.endswith("]"):
        cell = literal(cell)
    return list(cell) if isinstance(cell, list | tuple) else None


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None or value == "nan" else str(value)


def _lines(row: Row) -> str:
    return "".join(f"\n{letter}. {text}" for letter, text in options(row).items())


def _vlmevalkit_options(row: Row) -> str:
    hint, choices = _text(row, "hint"), options(row)
    prompt = (f"Hint: {hint}\n" if hint else "") + f"Question: {_text(row, 'question')}\n"
    if choices:
        prompt += "Options:\n" + "".join(f"{letter}. {text}\n" for letter, text in choices.items())
        prompt += "Please select the correct answer from the options above. \n"
    return prompt


def _letter_or_short(row: Row) -> str:
    choices = _lines(row)
    return _text(row, "question") + (f"{choices}\n{LETTER}" if choices else f"\n{SHORT}")


def _several_options(row: Row) -> str:
    hint = _text(row, "hint")
    before = f"{hint} " if hint else ""
    return f"{before}{_text(row, 'question')} There are several options:{_lines(row)}\n{LETTER}"


#: Prompts by name, with the exact words of VLMEvalKit and lmms-eval, on which their scores depend.
PROMPTS: dict[str, Callable[[Row], str]] = {
    "question": lambda row: _text(row, "question"),
    "short": lambda row: _text(row, "question") + SHORT,
    "options": _vlmevalkit_options,
    "letter": lambda row: _text(row, "question") + _lines(row) + LETTER,
    "letter_or_short": _letter_or_short,
    "several_options": _several_options,
    # lmms-eval lower-cases every letter of these questions but the first.
    "short_capitalised": lambda row: _text(row, "question").capitalize() + SHORT,
    # lmms-eval replaces the request in the question with its own.
    "short_yes_no": lambda row: _text(row, "question").strip().replace(" Please answer yes or no.", "") + SHORT,
    "query": lambda row: _text(row, "query") or _text(row, "question"),
}


def check(prompt: str) -> None:
    """Raise ``ValueError`` for a name that is not in :data:`PROMPTS`, or a template that cannot be parsed."""
    if "{" not in prompt and "}" not in prompt:
        if prompt not in PROMPTS:
            raise ValueError(f"no prompt {prompt!r}; there are {', '.join(PROMPTS)}, or a template with {{question}}")
        return
    list(string.Formatter().parse(prompt))


def ask(prompt: str, row: Row) -> str:
    """Return the text of a question.

    Args:
        prompt: a name from :data:`PROMPTS`, or a template. A template's fields are the row's columns, and ``{options}``
            (lines "A. …", each after a line break), ``{hint}`` and ``{context}`` ("Context: hint" and a line break),
            which are empty if the row has none.

    Raises:
        UserError: a template names a column that the row does not have.
    """
    if prompt in PROMPTS:
        return PROMPTS[prompt](row)
    hint = _text(row, "hint")
    made = {"options": _lines(row), "hint": hint, "context": f"Context: {hint}\n" if hint else ""}
    try:
        return prompt.format_map({**{name: "" if cell is None else cell for name, cell in row.items()}, **made})
    except (KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"prompt {prompt[:60]!r}: the data have no column {error}; they have {', '.join(row)}"
        ) from None


def parts(
    text: str, images: Sequence[ImageSource], interleave: bool
) -> tuple[list[dict[str, Any]], tuple[ImageSource, ...]]:
    """Return the parts of a user message, and their images in order.

    Args:
        interleave: put image k where the text says ``<image k>``. If the text has no such place, or without
            ``interleave``, all images come first. An image without a place is left out, as in VLMEvalKit.

    Raises:
        BadSample: the text asks for an image that the row does not have.
    """
    if not interleave or not _IMAGE_TAG.search(text):
        return [*({"type": "image"} for _ in images), {"type": "text", "text": text}], tuple(images)
    pieces = _IMAGE_TAG.split(text)  # text, number, text, number, …, text
    found: list[dict[str, Any]] = []
    placed = []
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            found += [{"type": "text", "text": piece}] if piece else []
            continue
        if not 1 <= int(piece) <= len(images):
            raise BadSample("image count mismatch", f"the question shows image {piece}, the row has {len(images)}")
        found.append({"type": "image"})
        placed.append(images[int(piece) - 1])
    return found, tuple(placed)
