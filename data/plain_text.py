"""Plain text as samples of bounded length: text files, or any source whose records have a key ``text``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .conversation import Document
from .errors import BadSample, UserError
from .paths import MAX_WHOLE
from .sources import Source

#: Roughly, for English: plain text is cut into pieces of about as many tokens as a row may have.
CHARACTERS_PER_TOKEN = 4

_SPACE = re.compile(r"\s")


class TextFiles(Source):
    """Text files, each one record ``{"text": …}``.

    Args:
        paths: the files.
        folder: where they were found; links that lead out of it are not followed.
    """

    def __init__(self, paths: Sequence[Path], name: str, folder: Path | None = None, **shared: Any) -> None:
        super().__init__(name, Path(), **shared)
        self.paths = list(paths)[self.rows]
        self.folder = folder

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Any:
        path = self.paths[index]
        if self.folder is not None and not path.resolve().is_relative_to(self.folder.resolve()):
            raise BadSample("file outside the folder", str(path))
        try:
            return {"text": path.read_text("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise BadSample("invalid UTF-8", f"{path.name}: {error}") from None

    def size(self, index: int) -> int:
        size = self.paths[index].stat().st_size
        if size > MAX_WHOLE:
            raise UserError(f"{self.paths[index]} is larger than {MAX_WHOLE >> 30} GiB; split it into several files")
        return size


class TextSource:
    """Plain text as samples of bounded length: whole documents, and pieces of long ones.

    Indexed like a :class:`~data.sources.Source`; each sample is a :class:`~data.conversation.Document`. The number of
    pieces follows from a document's size, without reading it. Pieces are equally long, up to the next white space.

    Args:
        records: each has its document under ``text``.
        characters: the approximate limit for one sample.
    """

    def __init__(self, records: Source, characters: int) -> None:
        self.name = records.name
        self.records = records
        sizes = records.sizes()
        self._pieces = np.maximum(1, -(-sizes // characters))
        self._sizes = sizes // self._pieces
        self._first = np.concatenate(([0], np.cumsum(self._pieces)))

    def __len__(self) -> int:
        return int(self._first[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's document, and which piece of it the sample is."""
        document = int(np.searchsorted(self._first, index, side="right")) - 1
        return document, index - int(self._first[document])

    def size(self, index: int) -> int:
        return int(self._sizes[self._locate(index)[0]])

    def line(self, index: int) -> int:
        return self.records.line(self._locate(index)[0])

    def __getitem__(self, index: int) -> Document:
        """Return the sample at ``index``. Raise ``BadSample`` if it has no text, ``IndexError`` past the end."""
        index = range(len(self))[index]
        document, piece = self._locate(index)
        record, pieces = self.records.record(document), int(self._pieces[document])
        text = record.get("text") if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            raise BadSample("no text", "a record of plain text has it under the key 'text'")
        part = text[_cut(text, piece, pieces) : _cut(text, piece + 1, pieces)]
        if not part.strip():
            raise BadSample("empty document")
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise BadSample("invalid Unicode", str(error)) from None
        return Document(part, self.name, self.line(index), last=piece + 1 == pieces)


def _cut(text: str, piece: int, pieces: int) -> int:
    """Return where piece ``piece`` of ``pieces`` begins: at the first white space inside it, if it has any."""
    start, stop = piece * len(text) // pieces, (piece + 1) * len(text) // pieces
    if start in (0, len(text)):
        return start
    found = _SPACE.search(text, start, stop)
    return start if found is None else found.start()
