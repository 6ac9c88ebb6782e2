"""VLMEvalKit's TSV files: tables with images as base64 in their cells, which are read one at a time."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .conversation import ImageSource
from .errors import BadSample, UserError
from .paths import MAX_LINE, bounded_lines, check_regular
from .tables import Row, Table

if TYPE_CHECKING:
    import pandas as pd

#: An ``image`` cell of at most this length is the index of another row, whose image is used.
POINTER = 64

# A cell can hold a whole image in base64. csv's limit (128 KiB by default) is global to the process.
csv.field_size_limit(2**31 - 1)

_IMAGE = "+"  # neither an index, nor anything that pandas reads as empty or as a number


class TsvTable(Table):
    """A file in the format of VLMEvalKit's data sets (its ``dataset/image_base.py``), indexed by byte offset.

    Cells get the types that pandas gives a whole column, because VLMEvalKit's scorers see these: a column of whole
    numbers with gaps becomes floating point, and ``None``, ``N/A`` and others are empty. All columns but ``image`` stay
    in memory.

    ``image`` holds base64, the literal of a list of base64 texts, or another row's index (:data:`POINTER`); that row
    must come earlier, or hold an image itself. Rows with an empty image cell are left out, as in VLMEvalKit. Without
    this column, ``image_path`` holds a path or the literal of a list of paths, relative to ``images``.

    Args:
        path: the file.
        images: the folder that paths start from; by default the file's.
        md5: the expected MD5, compared while the file is read; a difference is a warning.

    Attributes:
        left_out: number of rows without an image.

    Raises:
        UserError: the file is not such a table. The message names file, row and line.
    """

    def __init__(self, path: Path, *, name: str | None = None, images: Path | None = None, md5: str | None = None):
        self.name = name or path.stem
        self.path = path
        self._folder = images or path.parent
        digest = hashlib.md5(usedforsecurity=False) if md5 else None
        check_regular(path)
        header, cells, spans = _scan(path, digest)
        self.columns = header
        self._image_column = header.index("image") if "image" in header else None
        rows = _typed(header, cells)
        kept = [number for number, row in enumerate(rows) if self._image_column is None or row["image"] is not None]
        self.left_out = len(rows) - len(kept)
        self._rows = [rows[number] for number in kept]
        _whole_indices(self._rows)
        _warn_of_repeated(path, self._rows)
        self._lines, self._starts, self._lengths = spans[kept].T.copy()
        image_cells = [row.pop("image", _IMAGE) for row in self._rows]
        self._owners = self._follow([None if cell == _IMAGE else str(cell) for cell in image_cells])
        if digest is not None and digest.hexdigest() != md5:
            warnings.warn(
                f"{path}: md5 {digest.hexdigest()}, not the published {md5}; "
                "scores may differ from published ones: is this file complete and of this version?",
                stacklevel=2,
            )

    def _follow(self, pointers: Sequence[str | None]) -> np.ndarray:
        """Return for each row the number of the row that holds its image."""
        # Of several rows with the same index, the last counts.
        by_index = {str(row["index"]): number for number, row in enumerate(self._rows)}
        owners = np.arange(len(pointers))
        found = [pointer is None for pointer in pointers]
        for number, pointer in enumerate(pointers):
            if pointer is None:
                continue
            target = by_index.get(pointer)
            if target is None or not found[target]:
                what = "there is none" if target is None else "which has no image of its own"
                raise UserError(
                    f"{self.path}, row {number + 1} (line {self._lines[number]}): "
                    f"its image is that of row index {pointer!r}, {what}; the file is broken or truncated"
                )
            owners[number], found[number] = owners[target], True
        return owners

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return dict(self._rows[index])

    def line(self, index: int) -> int:
        return int(self._lines[index])

    def images(self, index: int) -> list[ImageSource]:
        if self._image_column is None:
            return [str(self._folder / path) for path in _texts(self._rows[index].get("image_path"))]
        owner = self._owners[range(len(self))[index]]
        with self.path.open("rb") as file:
            file.seek(self._starts[owner])
            text = file.read(self._lengths[owner]).decode()
        record = next(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
        return [_decoded(cell) for cell in _texts(record[self._image_column], what="image")]


def _scan(path: Path, digest: Any) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Return the header, the cells of each row, and its line, first byte and length. :data:`_IMAGE` replaces images."""
    cells, spans = [], []
    with path.open("rb") as file:
        records = table_records(path, file, digest=digest)
        header = next(records, (0, 0, 0, []))[3]
        _check_header(path, header)
        column = header.index("image") if "image" in header else None
        for row, (line, start, length, record) in enumerate(records, 1):
            if len(record) != len(header):
                raise UserError(
                    f"{path}, row {row} (line {line}) has {len(record)} of {len(header)} columns; "
                    "the file is truncated or not tab-separated: fetch it again"
                )
            if column is not None and len(record[column]) > POINTER:
                record[column] = _IMAGE
            cells.append(record)
            spans.append((line, start, length))
    if not cells:
        raise UserError(f"{path} has no rows; fetch it again")
    return header, cells, np.array(spans, dtype=np.int64)


def _check_header(path: Path, header: Sequence[str]) -> None:
    missing = [name for name in ("index", "question") if name not in header]
    if "image" not in header and "image_path" not in header:
        missing.append("image or image_path")
    if missing:
        found = ", ".join(header)[:200] or "none: the file is empty"
        hint = ""
        if len(header) == 1 and any(mark in header[0] for mark in ",;"):
            hint = "; the columns of a .tsv are separated by tabs, and these look separated by commas: convert the file"
        raise UserError(f"{path} has no column {' and no column '.join(missing)}; its columns: {found}{hint}")


def table_records(
    path: Path, file: BinaryIO, delimiter: str = "\t", *, digest: Any = None
) -> Iterator[tuple[int, int, int, list[str]]]:
    """Yield the line, first byte, length and cells of each record. Quoted cells may hold delimiters and line breaks.

    Raises:
        UserError: the file is not UTF-8, a quotation mark is never closed, or a record is longer than
            :data:`data.paths.MAX_LINE`.
    """
    position = line = 0
    rows = -1  # the first record is the header

    def lines() -> Iterator[str]:
        nonlocal position, line
        for raw in bounded_lines(path, file):
            if digest is not None:
                digest.update(raw)
            position += len(raw)
            line += 1
            if position - start > MAX_LINE:
                raise UserError(
                    f"{path}, row {rows + 1} (line {first}): a quotation mark is never closed; fetch it again"
                )
            try:
                yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, row {rows + 1} (line {line}): not UTF-8 ({error.reason})") from None

    reader = csv.reader(lines(), delimiter=delimiter)
    start, last, first = 0, 0, 1
    try:
        # The reader consumes no more lines than the record needs, so `position` is the end of the record.
        for record in reader:
            rows += bool(record)
            if record:
                yield first, start, position - start, record
                last = start
            start, first = position, line + 1
    except csv.Error as error:
        raise UserError(f"{path}, row {rows + 1} (line {first}): {error}; fetch the file again") from None
    # Only a strict reader notices a quotation mark that is never closed; it also refuses oddities that pandas accepts.
    file.seek(last)
    try:
        list(csv.reader(io.StringIO(file.read().decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise UserError(f"{path}, row {rows}: a quotation mark is never closed; fetch the file again") from None


def _typed(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[Row]:
    """Return the rows with the types that pandas infers from such a file; empty cells are ``None``."""
    import pandas as pd  # takes half a second, and few runs read such a table

    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t").writerows([header, *cells])
    text.seek(0)
    return plain_rows(pd.read_csv(text, sep="\t", low_memory=False, skip_blank_lines=False))


def plain_rows(frame: pd.DataFrame) -> list[Row]:
    """Return a pandas table as rows of Python values, with ``None`` for NaN."""
    named = frame.rename(columns=str).astype(object)
    return [dict(row) for row in named.where(named.notna(), None).to_dict("records")]


def _whole_indices(rows: Sequence[Row]) -> None:
    """Convert the indices to whole numbers if all of them are, else to text."""
    texts = [str(row["index"]) for row in rows]
    whole = all(text.removeprefix("-").isdecimal() for text in texts)
    for row, text in zip(rows, texts, strict=True):
        row["index"] = int(text) if whole else text
        if "image_path" in row and row["image_path"] is not None:
            paths = _texts(row["image_path"])
            row["image_path"] = paths[0] if len(paths) == 1 else paths


def _warn_of_repeated(path: Path, rows: Sequence[Row]) -> None:
    """Warn if rows share an index, by which VLMEvalKit joins answers with questions."""
    counts = Counter(row["index"] for row in rows)
    repeated = [index for index, count in counts.items() if count > 1]
    if repeated:
        warnings.warn(
            f"{path}: {len(repeated):,} values of index occur more than once, the first is {repeated[0]}; "
            "by VLMEvalKit's rules the last row's right answer or answer counts for all of them: renumber the rows",
            stacklevel=3,
        )


def _texts(cell: Any, what: str = "image_path") -> list[str]:
    """Return the texts of a cell that holds one text, a list of texts, or the literal of such a list."""
    if cell is None:
        return []
    if isinstance(cell, str) and cell.startswith("[") and cell.endswith("]"):
        try:
            cell = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise BadSample("list of images is broken", f"{what}: {cell[:40]}…") from None
    return [str(item) for item in cell] if isinstance(cell, list) else [str(cell)]


def _decoded(cell: str) -> bytes:
    try:
        return base64.b64decode("".join(cell.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("image is not base64", str(error)) from None
