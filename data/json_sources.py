"""JSON and JSONL files, plain or gzipped, as sources of conversations."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import BadSample, UserError
from .layouts import layout_of
from .paths import MAX_WHOLE, bounded_lines
from .sources import IndexedFile, Source


class JsonlSource(IndexedFile):
    """A file with one JSON record per line, indexed by byte offset and read record by record. Skips blank lines.

    Args:
        path: the file.
        text: the decompressed content of a compressed file.

    Raises:
        UserError: a line is longer than :data:`data.paths.MAX_LINE`.
    """

    def __init__(self, path: Path, name: str, images: Path, *, text: bytes | None = None, **shared: Any) -> None:
        super().__init__(name, images, **shared)
        self.path = path
        self._text = text
        with self._open() as file:
            self._index(islice(_spans(path, file), self.rows.start, self.rows.stop))

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._text is None else io.BytesIO(self._text)

    def read(self, index: int) -> Any:
        if self._text is not None:
            start = self._starts[index]
            return _parsed(self._text[start : start + self._lengths[index]])
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            raw = file.read(self._lengths[index])
        if len(raw) < self._lengths[index]:
            raise UserError(
                f"{self.path} ends before its line {self.line(index)}; it has changed since the run began: "
                "put it back, and start the run again to resume"
            )
        return _parsed(raw)


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("invalid UTF-8", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadSample("invalid JSON", str(error)) from None


def _spans(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Yield the number, first byte and length of each line that is not blank."""
    start = 0
    for number, line in enumerate(bounded_lines(path, file), 1):
        if not line.isspace():
            yield number, start, len(line)
        start += len(line)


class JsonSource(Source):
    """A file with a JSON list of records, or a single record.

    The records are kept as text in one block of memory, which worker processes share. As Python objects, a large file
    would be copied into each of them.

    Args:
        path: the file.
        text: the decompressed content of a compressed file.

    Raises:
        UserError: the file is not valid JSON, neither a list nor a record, or larger than
            :data:`data.paths.MAX_WHOLE`.
    """

    def __init__(self, path: Path, name: str, images: Path, *, text: bytes | None = None, **shared: Any) -> None:
        super().__init__(name, images, **shared)
        try:
            content = _read_whole(path) if text is None else text
            records = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}; fix the file, or name its format") from None
        if isinstance(records, dict) and self._is_record(records):
            records = [records]
        if not isinstance(records, list):
            keys = f" with the keys {', '.join(records)[:200]}" if isinstance(records, dict) else ""
            raise UserError(
                f"{path} holds one JSON {_JSON_TYPES.get(type(records), 'value')}{keys}, not a list of records; "
                "make it a list or JSONL"
            )
        try:
            texts = [json.dumps(record).encode() for record in records[self.rows]]
        except RecursionError:
            raise UserError(f"{path} holds lists or objects nested too deeply; fix the file") from None
        self._text = b"".join(texts)
        self._ends = np.cumsum([0, *map(len, texts)])

    def _is_record(self, content: Any) -> bool:
        try:
            layout_of(self._renamed(content), has_image=True)
        except BadSample:
            return False
        return True

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, index: int) -> Any:
        return json.loads(self._text[self._ends[index] : self._ends[index + 1]])

    def size(self, index: int) -> int:
        return int(self._ends[index + 1] - self._ends[index])


_BOM = b"\xef\xbb\xbf"
_JSON_TYPES = {dict: "object", str: "text", int: "number", float: "number", bool: "truth value"}


def _read_whole(path: Path) -> bytes:
    """Read a whole file. Raise ``UserError`` if it is too large or not text."""
    with path.open("rb") as file:
        if b"\0" in file.read(4096):
            raise UserError(f"{path} is not valid JSON: it begins with zero bytes; fetch it again")
        if path.stat().st_size > MAX_WHOLE:
            raise UserError(f"{path} is larger than {MAX_WHOLE >> 30} GiB, too large for one JSON value; write JSONL")
        file.seek(0)
        return file.read()


def _decompress(path: Path) -> bytes:
    """Read a whole ``.gz`` file, which offers no random access."""
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_WHOLE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a sound gzip file ({error}); fetch it again") from None
    if len(content) > MAX_WHOLE:
        raise UserError(f"{path} unpacks to more than {MAX_WHOLE >> 30} GiB, too much for memory; unpack it on disk")
    return content


def _detect_kind(path: Path, text: bytes | None, kind: str) -> str:
    """Return ``jsonl`` or ``json`` by content: JSONL named .json is common, and so is one value named .jsonl."""
    with path.open("rb") if text is None else io.BytesIO(text) as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()
        if kind == "json" and not start.startswith(b"{"):
            return "json"

        # Does the first line hold a whole value?
        file.seek(0)
        lines = (line for line in bounded_lines(path, file) if not line.isspace())
        first = next(lines, b"").removeprefix(_BOM)
        alone = next(lines, None) is None
        try:
            value = json.loads(first)
        except (ValueError, RecursionError):
            pass
        else:
            # A file of one line is what its name says, unless the line is a list, which is not a record.
            whole = alone and (kind == "json" or isinstance(value, list))
            return "json" if whole else "jsonl"

        # It does not: either the line is broken, or a value spans several lines.
        if not start.startswith((b"{", b"[")):
            return kind
        file.seek(0)
        content = file.read(MAX_WHOLE + 1)
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return "jsonl"
    return "json"


def open_json(
    path: Path, kind: str, name: str | None, folder: Path, *, detect: bool, **shared: Any
) -> JsonlSource | JsonSource:
    """Open a JSON or JSONL file.

    Args:
        kind: ``json`` or ``jsonl``, as the file's name or the user says.
        detect: look into the file too, because only its name says so.
        shared: further arguments of :class:`JsonlSource`.
    """
    compressed = path.suffix.lower() == ".gz"
    text = _decompress(path) if compressed else None
    if detect:
        kind = _detect_kind(path, text, kind)
    if name is None:
        name = Path(path.stem).stem if compressed else path.stem
    reader = JsonlSource if kind == "jsonl" else JsonSource
    return reader(path, name, folder, text=text, **shared)
