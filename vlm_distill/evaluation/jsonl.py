"""JSON a line, added as it comes and read after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(path: Path, entry: Any) -> None:
    """Adds a line, and the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        # The line break comes first, so that a line which a kill cut short spoils no other.
        file.write("\n" + json.dumps(entry, ensure_ascii=False))


def entries(path: Path) -> Iterator[Any]:
    """What the lines hold; those that are empty, cut short or damaged are passed over."""
    for line in path.read_bytes().split(b"\n"):  # texts hold other line breaks
        try:
            yield json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
