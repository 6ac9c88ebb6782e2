"""Read official benchmark files in JSON: questions joined with their annotations by id, as rows in memory."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .tables import ImageFiles, Row, RowTable


@dataclass(frozen=True)
class Records:
    """Where to find the records of a JSON file.

    The file holds a list of records, one record per line, or an object that maps ids to records. A record is an object,
    a list (see ``fields``), or in a file by ids any other value.

    Attributes:
        path: the file.
        under: the key of the list or object, if the file holds more.
        key: in a file by ids, the column for the id; the column for a value that is not an object is ``fields[0]``.
        fields: names for the items of records that are lists.
    """

    path: Path
    under: str | None = None
    key: str = "id"
    fields: Sequence[str] = ()


def read_records(given: Records) -> list[Row]:
    """Return all records of a file.

    Raises:
        UserError: the file is not valid JSON or has another layout. The message names file and record.
    """
    content = _read(given.path)
    if given.under is not None:
        if not isinstance(content, Mapping) or given.under not in content:
            found = f"keys {', '.join(map(str, content))[:200]}" if isinstance(content, Mapping) else "a list"
            raise UserError(f"{given.path} has nothing under {given.under!r} ({found}); is it the right file?")
        content = content[given.under]
    if isinstance(content, Mapping):
        if not given.fields and not any(isinstance(value, Mapping) for value in content.values()):
            return [dict(content)]  # one line, so a single record
        return [{given.key: key, **_row(given, value, key)} for key, value in content.items()]
    if not isinstance(content, list):
        raise UserError(f"{given.path} holds a {type(content).__name__}, not a list of records; is it the right file?")
    return [_row(given, value, number) for number, value in enumerate(content, 1)]


def _row(given: Records, value: Any, where: Any) -> Row:
    if isinstance(value, Mapping):
        return dict(value)
    items = value if isinstance(value, list) and len(given.fields) != 1 else [value]
    if len(items) != len(given.fields):
        raise UserError(f"{given.path}, record {where}: not an object but {json.dumps(value)[:60]}")
    return dict(zip(given.fields, items, strict=True))


def _read(path: Path) -> Any:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); fetch it again") from None
    try:
        return json.loads(text)
    except ValueError as error:
        whole = error
    # One record per line, as in POPE's files, despite their suffix .json.
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except ValueError as error:
            problem = f"line {number}: {error}" if records else str(whole)
            raise UserError(f"{path} is not valid JSON ({problem}); the file is truncated or not JSON") from None
    return records


def join_rows(rows: Sequence[Row], on: str, other: Sequence[Row], *, files: tuple[Path, Path]) -> list[Row]:
    """Join rows with those of ``other`` that have the same value in column ``on``.

    If both have a column, that of ``rows`` counts. Unmatched rows of ``other`` are ignored.

    Raises:
        UserError: a row has no match, or no column ``on``.
    """
    by_key = {str(_cell(row, on, number, files[1])): row for number, row in enumerate(other, 1)}
    result = []
    for number, row in enumerate(rows, 1):
        key = str(_cell(row, on, number, files[0]))
        if key not in by_key:
            raise UserError(f"{files[0]}, record {number}: {files[1]} has no {on} {key}; are both files of one split?")
        result.append({**by_key[key], **row})
    return result


def _cell(row: Row, column: str, number: int, path: Path) -> Any:
    if column not in row:
        raise UserError(f"{path}, record {number} has no key {column!r}; its keys: {', '.join(row)[:200]}")
    return row[column]


def json_table(name: str, rows: Sequence[Row], files: Sequence[Path], images: Path, pattern: str) -> RowTable:
    """Return a table of the rows, with image paths from a pattern (:class:`~data.tables.ImageFiles`).

    Raises:
        UserError: there are no rows, or a row lacks a column of the pattern.
    """
    where = ", ".join(map(str, files))
    if not rows:
        raise UserError(f"{where}: no rows; check the file and the split")
    for column in _columns(pattern):
        for number, row in enumerate(rows, 1):
            if column not in row:
                raise UserError(f"{where}, record {number} has no key {column!r}, which names its image")
    return RowTable(rows, name, ImageFiles(images, pattern))


def _columns(pattern: str) -> Iterator[str]:
    return (field for _, field, _, _ in string.Formatter().parse(pattern) if field)
