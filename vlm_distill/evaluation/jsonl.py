"""Append-only JSON lines that can be read after the writer was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(path: Path, entry: Any) -> None:
    """Append a line; create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        # The line break comes first, so that a line cut short by a kill does not damage the next one.
        file.write("\n" + json.dumps(entry, ensure_ascii=False))


def entries(path: Path) -> Iterator[Any]:
    """Yield the lines' values; skip lines that are empty, cut short or damaged."""
    for line in path.read_bytes().split(b"\n"):  # not splitlines: texts hold other line breaks
        try:
            yield json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
