"""Pieces of Markdown that the reference pages are made of."""

from __future__ import annotations

import re
from textwrap import indent


def heading(level: int, text: str, anchor: str) -> str:
    """Return a heading with an anchor of its own."""
    return f"{'#' * level} {text} {{#{anchor}}}\n"


def definition(term: str, body: str, anchor: str = "") -> str:
    """Return an entry of a definition list. With an anchor, its term, a piece of code, can be linked to."""
    mark = "{#" + re.sub(r"[^\w.-]+", "-", anchor) + "}" if anchor else ""
    text = indent(body, "    ").lstrip()
    return f"{term}{mark}\n:   {text}\n"
