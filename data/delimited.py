"""Tables in CSV and TSV as a source of conversations: each row is a record with the header's names as keys."""

from __future__ import annotations

import ast
import csv
import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import BadSample, UserError
from .paths import check_regular
from .sources import IndexedFile
from .tsv import table_records

#: Keys whose cells may hold a list or an object, in JSON or as a Python literal.
_LISTS = ("messages", "conversations", "conversation", "texts", "prompt", "completion", "history")
_VALUES = ("images", "image", "videos", "video", "answers", "tools", "functions", "metadata", "objects")


class DelimitedSource(IndexedFile):
    """A table with a header, indexed by byte offset and read row by row.

    An empty cell is a missing key. A list of messages or images in a cell is read as JSON, or as the literal that
    pandas writes.

    Args:
        path: the file.
        delimiter: ``","`` or a tab.

    Raises:
        UserError: the file is not such a table, or not UTF-8.
    """

    def __init__(self, path: Path, name: str, images: Path, *, delimiter: str, **shared: Any) -> None:
        super().__init__(name, images, **shared)
        self.path = path
        self._delimiter = delimiter
        self._ours = {theirs: ours for ours, theirs in self.columns.items()}
        check_regular(path)
        with path.open("rb") as file:
            rows = table_records(path, file, delimiter)
            self._header = next(rows, (0, 0, 0, []))[3]
            _check_header(path, self._header, delimiter)
            chosen = islice(rows, self.rows.start, self.rows.stop)
            self._index((line, start, length) for line, start, length, _ in chosen)

    def read(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            text = file.read(self._lengths[index]).decode(errors="replace")
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter), [])
        if len(cells) != len(self._header):
            raise BadSample("row of another length", f"{len(cells)} cells under {len(self._header)} columns")
        return {key: self._value(key, cell) for key, cell in zip(self._header, cells, strict=True) if cell}

    def _value(self, key: str, cell: str) -> Any:
        key = self._ours.get(key, key)
        if key not in (*_LISTS, *_VALUES) or not cell.lstrip().startswith(("[", "{")):
            return cell
        value = _literal(cell)
        if value is None:
            return cell
        if key in _LISTS:
            # Otherwise it is a text that happens to begin like a list.
            is_list = isinstance(value, list) and not any(isinstance(one, str | int) for one in value)
            return value if is_list else cell
        return value


def _literal(text: str) -> Any:
    """Return the value of JSON or a Python literal; ``None`` if it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    if len(header) == 1:
        other = next((mark for mark in ("\t", ",", ";") if mark != delimiter and mark in header[0]), None)
        if other is not None:
            known = {"\t": "tabs: name it .tsv", ",": "commas: name it .csv", ";": "semicolons: save it with commas"}
            raise UserError(f"{path} has one column, {header[0][:80]!r}; divided by {known[other]}")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has two columns called {twice!r}; rename one")
