"""Show samples as each model receives them, with supervised tokens highlighted: in the terminal and as a page."""

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
    """A sample as one model receives it. Each list has one entry per token.

    Attributes:
        pieces: the token's text.
        supervised: whether the loss sees the token.
        ends: whether it is the end token of an answer.
        image: whether it is an image token.
    """

    pieces: list[str]
    supervised: list[bool]
    ends: list[bool]
    image: list[bool]


@dataclass(frozen=True)
class InspectedSample:
    """A sample, its images, and how each model receives it.

    Attributes:
        title: the sample's name.
        images: its images.
        models: ``student`` and ``teacher``, if there is one.
        problem: why training would leave the sample out.
        groups: the texts of the student's and the teacher's tokens that are compared, where their tokenizers differ.
    """

    title: str
    images: list[Image.Image] = field(default_factory=list)
    models: dict[str, InspectedModel] = field(default_factory=dict)
    problem: str | None = None
    groups: list[tuple[str, str]] = field(default_factory=list)


class TokenRun(NamedTuple):
    """Neighbouring tokens of one kind: ``prompt``, ``answer``, ``end`` or ``image``."""

    kind: str
    pieces: list[str]

    @property
    def label(self) -> str:
        """Return what is shown in place of image tokens."""
        return f"⟨image · {len(self.pieces)} token{'s' if len(self.pieces) > 1 else ''}⟩"


def token_runs(model: InspectedModel) -> list[TokenRun]:
    """Split the sequence where the kind of token changes."""
    tokens = zip(model.pieces, map(_kind, model.supervised, model.ends, model.image), strict=True)
    runs = []
    for kind, group in groupby(tokens, key=lambda token: token[1]):
        runs.append(TokenRun(kind, [piece for piece, _ in group]))
    return runs


def _kind(supervised: bool, end: bool, image: bool) -> str:
    if image:
        return "image"
    if not supervised:
        return "prompt"
    return "end" if end else "answer"


def counts(model: InspectedModel) -> str:
    """Say how many tokens of each kind there are."""
    return (
        f"{len(model.pieces)} tokens, {sum(model.image)} of images, "
        f"{sum(model.supervised)} supervised, {sum(model.ends)} of them end tokens"
    )


def visible(piece: str) -> str:
    """Make line breaks and tabs in a token visible; the breaks themselves are kept."""
    return piece.replace("\t", "→\t").replace("\r", "␍").replace("\n", "↵\n")


def group_text(group: tuple[str, str]) -> str:
    """Return the tokens of both models, or only once if they are the same."""
    return group[0] if group[0] == group[1] else f"{group[0]} = {group[1]}"


def render_terminal(samples: Sequence[InspectedSample], console: Console) -> None:
    """Print the samples. Images are drawn in half blocks if the terminal has colours, else their sizes are printed."""
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
        columns = [Group(*parts)]
        if sample.images:
            draw = _blocks if console.color_system else _size
            columns.insert(0, Group(*map(draw, sample.images)))
        grid = Table.grid(padding=(0, 2))
        grid.add_row(*columns)
        console.print(grid)


def _size(image: Image.Image) -> Text:
    return Text(f"[{image.width}×{image.height}]", "dim")


def _blocks(image: Image.Image) -> Text:
    """Draw an image in characters: each half block shows two pixels, one above the other."""
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
    """Write one self-contained page about the samples, and return its path."""
    template = environment().get_template("inspect.html.j2")
    page = template.render(samples=[*map(_for_page, samples)], legend=_LEGEND, visible=visible)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")
    return path


def _for_page(sample: InspectedSample) -> dict[str, Any]:
    return {
        "title": sample.title,
        "problem": sample.problem,
        "images": [{**image_uri(image.copy(), _PAGE_IMAGE), "size": image.size} for image in sample.images],
        "models": [(name, counts(model), token_runs(model)) for name, model in sample.models.items()],
        "groups": [group_text(group) for group in sample.groups],
    }


def write_lines(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write one JSON object per line to a file, or to standard output if the path is ``-``."""
    if path == Path("-"):
        for entry in entries:
            print(json.dumps(entry))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half a surrogate pair (a cut emoji) cannot be written in UTF-8, except as an escape.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
