"""Read JSON files that the suite wrote; any damage becomes a one-line error."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
