"""Samples as each model receives them, supervised tokens highlighted: in the terminal and as an HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .rendering import environment, image_uri

_TERMINAL_IMAGE = 24
_PAGE_IMAGE = 320
_STYLES = {"answer": "black on bright_yellow", "end": "bold white on red", "image": "cyan", "prompt": ""}
_LEGEND = (
    ("answer", "supervised"),
    ("end", "supervised end token"),
    ("prompt", "not supervised"),
    ("image", "image tokens"),
)


@dataclass(frozen=True)
class InspectedModel:
    """A sample as one model receives it, token by token; all four lists have the length of the sequence.

    Attributes:
        pieces: the text of each token.
        supervised: whether the loss sees it.
        ends: whether it is the end token of an answer.
        image: whether it stands for a part of an image.
    """

    pieces: list[str]
    supervised: list[bool]
    ends: list[bool]
    image: list[bool]


@dataclass(frozen=True)
class InspectedSample:
    """A sample, its images, and how each model (``student``, ``teacher``) receives it.

    ``problem`` says why training would leave the sample out. ``groups``, where the tokenizers differ, are the student's
    and the teacher's tokens that are compared.
    """

    title: str
    images: list[Image.Image] = field(default_factory=list)
    models: dict[str, InspectedModel] = field(default_factory=dict)
    problem: str | None = None
    groups: list[tuple[str, str]] = field(default_factory=list)


class Run(NamedTuple):
    """Neighbouring tokens of one kind: ``prompt``, ``answer``, ``end`` or ``image``."""

    kind: str
    pieces: list[str]

    @property
    def label(self) -> str:
        return f"⟨image · {len(self.pieces)} token{'s' if len(self.pieces) > 1 else ''}⟩"


def token_runs(model: InspectedModel) -> list[Run]:
    """The sequence cut where the kind of token changes."""
    rows = zip(model.pieces, model.supervised, model.ends, model.image, strict=True)
    kinds = [
        ("image" if image else "end" if supervised and end else "answer" if supervised else "prompt", piece)
        for piece, supervised, end, image in rows
    ]
    return [Run(kind, [piece for _, piece in group]) for kind, group in groupby(kinds, key=lambda row: row[0])]


def counts(model: InspectedModel) -> str:
    """How many tokens of what kind, in words."""
    return (
        f"{len(model.pieces)} tokens, {sum(model.image)} of images, "
        f"{sum(model.supervised)} supervised, {sum(model.ends)} of them end tokens"
    )


def visible(piece: str) -> str:
    """A token's text with line breaks and tabs shown as signs; the break itself is kept."""
    return piece.replace("\t", "→\t").replace("\r", "␍").replace("\n", "↵\n")


def group_text(group: tuple[str, str]) -> str:
    """The tokens of both models; once where they are the same."""
    return group[0] if group[0] == group[1] else f"{group[0]} = {group[1]}"


def render_terminal(samples: Sequence[InspectedSample], console: Console) -> None:
    """Prints the samples; pictures in half blocks where the terminal has colours, else their size."""
    legend = Text("  ").join(Text(f" {name} ", _STYLES[kind]) for kind, name in _LEGEND)
    console.print(legend)
    for sample in samples:
        console.rule(Text(sample.title, "bold"), align="left")
        parts: list[Any] = []
        if sample.problem:
            parts.append(Text.assemble((" left out ", "bold white on red"), " ", sample.problem))
        for name, model in sample.models.items():
            text = Text()
            for run in token_runs(model):
                content = run.label if run.kind == "image" else "".join(map(visible, run.pieces))
                text.append(content, _STYLES[run.kind])
            parts += [Text.assemble((name, "bold"), (f"  {counts(model)}", "dim")), Padding(text, (0, 0, 1, 2))]
        if sample.groups:
            compared = Text("  ").join(Text(visible(group_text(group)), _STYLES["answer"]) for group in sample.groups)
            title = Text.assemble(("groups", "bold"), (f"  {len(sample.groups)}, student = teacher", "dim"))
            parts += [title, Padding(compared, (0, 0, 1, 2))]
        row = Table.grid(padding=(0, 2))
        pictures = [_blocks(image) if console.color_system else _size(image) for image in sample.images]
        row.add_row(*([Group(*pictures)] if pictures else []), Group(*parts))
        console.print(row)


def _size(image: Image.Image) -> Text:
    return Text(f"[{image.width}×{image.height}]", "dim")


def _blocks(image: Image.Image) -> Text:
    """A picture in characters: each upper half block shows two pixels, one above the other."""
    small = image.convert("RGB")
    small.thumbnail((_TERMINAL_IMAGE, _TERMINAL_IMAGE))
    text = Text(no_wrap=True)
    for y in range(0, small.height, 2):
        for x in range(small.width):
            top = _hex(small.getpixel((x, y)))
            bottom = _hex(small.getpixel((x, y + 1))) if y + 1 < small.height else None
            text.append("▀", f"{top} on {bottom}" if bottom else top)
        text.append("\n")
    return text.append_text(_size(image))


def _hex(pixel: Any) -> str:
    return "#{:02x}{:02x}{:02x}".format(*pixel)


def render_html(samples: Sequence[InspectedSample], path: Path) -> Path:
    """Writes one self-contained page about the samples."""
    page = (
        environment()
        .get_template("inspect.html.j2")
        .render(
            samples=[
                {
                    "title": sample.title,
                    "problem": sample.problem,
                    "images": [{**image_uri(image.copy(), _PAGE_IMAGE), "size": image.size} for image in sample.images],
                    "models": [(name, counts(model), token_runs(model)) for name, model in sample.models.items()],
                    "groups": [group_text(group) for group in sample.groups],
                }
                for sample in samples
            ],
            legend=_LEGEND,
            visible=visible,
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")
    return path


def write_lines(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write one JSON object per line; a path ``-`` is standard output."""
    if path == Path("-"):
        for entry in entries:
            print(json.dumps(entry))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half an emoji of somebody's text has no other form in UTF-8 than its escape.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
