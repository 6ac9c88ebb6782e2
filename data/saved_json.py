"""JSON files that the suite wrote: damage becomes a one-line error, or in journals a line that is skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .errors import UserError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one per line, ignoring an incomplete last line (of a killed process).

    Raises:
        UserError: another line is not a JSON object.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    entries = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; remove that line, or put the file back")
        entries.append(entry)
    return entries


def read_object(path: Path, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        shape: required keys and their types; the values are returned unchanged.

    Raises:
        UserError: the file cannot be read or is truncated, is not an object, or a key is missing or of another type.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    for key, kind in (shape or {}).items():
        if key not in found:
            raise UserError(f"{path}: has no {key}")
        try:
            TypeAdapter(kind).validate_python(found[key], strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (key, *first["loc"])))
            raise UserError(f"{path}: {where}: {first['msg'].lower()}") from None
    return found


def append_line(path: Path, entry: Any) -> None:
    """Append a JSON line to a journal, which can be read after the writer was killed; create the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        # The line break comes first, so that a line cut short by a kill does not damage the next one.
        file.write("\n" + json.dumps(entry, ensure_ascii=False))


def readable_lines(path: Path) -> Iterator[Any]:
    """Yield the values of a journal's lines; skip lines that are empty, cut short or damaged."""
    for line in path.read_bytes().split(b"\n"):  # not splitlines: texts include other line breaks
        try:
            yield json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
