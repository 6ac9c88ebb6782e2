"""Readers: JSON, JSONL, Hugging Face data sets and plain text as indexable sources of conversations or documents.

WebDataset shards and tables in CSV have readers of their own, webdataset.py and delimited.py.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import re
import zlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .conversation import Conversation, Document
from .datasets_library import open_dataset
from .errors import BadSample, UserError
from .keys import is_empty
from .layouts import COLUMNS, TEXT_COLUMNS, layout_of, to_conversation
from .places import check_regular
from .tars import find_shards, is_shard_pattern

FORMATS = ("auto", "json", "jsonl", "csv", "tsv", "huggingface", "webdataset")
#: The longest line of a file, and the longest record of a table. What is longer is damaged, and would fill the memory.
MAX_LINE = 256 << 20
#: The largest file that is read whole: JSON, and compressed files when unpacked.
MAX_WHOLE = 4 << 30
#: Of English, about: a row of plain text is cut to have about as many tokens as may stand in one.
CHARACTERS_PER_TOKEN = 4

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "huggingface",
    ".arrow": "huggingface",
    ".tar": "webdataset",
}
_UNPACKABLE = ("json", "jsonl")
_SPACE = re.compile(r"\s")


class Source(ABC):
    """Conversations by index, ``source[0]`` to ``source[len(source) - 1]``.

    A source can be pickled and inherited by worker processes: it holds no open file.

    Args:
        name: what reports call it.
        images: the folder that relative image paths start from.
        answers_required: whether a record without an assistant's answer is a bad sample.
        columns: our name for a key (:data:`data.layouts.COLUMNS`): the key that the records have for it.

    Attributes:
        not_read: how often each key was met that nothing read, such as ``rating`` or ``messages[].score``. Filled while
            this process reads samples.
    """

    def __init__(
        self,
        name: str,
        images: Path,
        answers_required: bool = True,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.images = images
        self.answers_required = answers_required
        self.columns = dict(columns or {})
        #: The names that nobody has to be asked about: what the columns assign is meant.
        self.chosen = set(self.columns)
        self.not_read: Counter[str] = Counter()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Any:
        """The record as it is stored. Raises ``BadSample`` where it cannot be read."""

    def record(self, index: int) -> Any:
        """The record with its keys by our names. Raises ``BadSample`` where it cannot be read."""
        return self._renamed(self.read(index))

    def _renamed(self, record: Any) -> Any:
        if not self.columns or not isinstance(record, Mapping):
            return record
        named = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        others = {key: value for key, value in record.items() if key not in self.columns.values()}
        self.not_read.update(key for key in named if not is_empty(others.get(key)))
        return others | named

    @abstractmethod
    def size(self, index: int) -> int:
        """About how long a sample is, in characters or bytes; cheap, decodes no image. For grouping by length."""

    def sizes(self) -> NDArray[np.int64]:
        """:meth:`size` of every sample, ``[len(self)]``."""
        return np.array([self.size(i) for i in range(len(self))], dtype=np.int64)

    def line(self, index: int) -> int:
        """The 1-based place of a sample in its file, for reports."""
        return index + 1

    def __getitem__(self, index: int) -> Conversation:
        """The sample at ``index``. Raises ``BadSample`` for a malformed one, ``IndexError`` past the end."""
        index = range(len(self))[index]
        try:
            return to_conversation(
                self.record(index),
                images=self.images,
                source=self.name,
                line=self.line(index),
                answers_required=self.answers_required,
                unread=self.not_read,
                chosen=self.chosen,
            )
        except RecursionError:  # lists in lists in lists, where JSON allows them
            raise BadSample("nested too deeply", "a list or object in the record") from None


class IndexedFile(Source):
    """Records of a file that are found by byte offset; a subclass calls :meth:`_index` once."""

    def _index(self, spans: Iterable[tuple[int, int, int]]) -> None:
        """Keep line number, first byte and length of each record.

        Arrays, not lists: worker processes share them without touching reference counts.
        """
        flat = array("q")
        for span in spans:
            flat.extend(span)
        self._lines, self._starts, self._lengths = np.array(flat, dtype=np.int64).reshape(-1, 3).T.copy()

    def __len__(self) -> int:
        return len(self._starts)

    def size(self, index: int) -> int:
        return int(self._lengths[index])

    def sizes(self) -> NDArray[np.int64]:
        return self._lengths

    def line(self, index: int) -> int:
        return int(self._lines[index])


class JsonlSource(IndexedFile):
    """A file with one JSON record a line, indexed by byte offset once and read line by line. Blank lines do not count.

    Args:
        path: the file.
        text: its content, where the file is compressed.
        limit: only the first so many records.

    Raises:
        UserError: a line is longer than :data:`MAX_LINE`.
    """

    def __init__(
        self, path: Path, name: str, images: Path, *, text: bytes | None = None, limit: int | None = None, **shared: Any
    ) -> None:
        super().__init__(name, images, **shared)
        self.path = path
        self._text = text
        with self._open() as file:
            self._index(islice(_spans(path, file), limit))

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


def bounded_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Give the lines of a file. Raises ``UserError`` at one that would fill the memory."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise UserError(
                f"line {number} of {path} is longer than {MAX_LINE >> 20} MiB; the file is damaged or of another format"
            )
        yield line


def _spans(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and length of each line that is not blank."""
    start = 0
    for number, line in enumerate(bounded_lines(path, file), 1):
        if not line.isspace():
            yield number, start, len(line)
        start += len(line)


class JsonSource(Source):
    """A file with one JSON list of records, or with one record.

    The records are kept as text in one block of memory, which worker processes share; as Python objects a large file
    would be copied into each of them.

    Args:
        path: the file.
        text: its content, where the file is compressed.
        limit: only the first so many records.

    Raises:
        UserError: the file is not valid JSON, neither a list nor a record, or larger than :data:`MAX_WHOLE`.
    """

    def __init__(
        self, path: Path, name: str, images: Path, *, text: bytes | None = None, limit: int | None = None, **shared: Any
    ) -> None:
        super().__init__(name, images, **shared)
        try:
            records = json.loads((_whole(path) if text is None else text).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}; mend the file, or name its format") from None
        if isinstance(records, dict) and self._is_record(records):
            records = [records]
        if not isinstance(records, list):
            keys = f" with the keys {', '.join(records)[:200]}" if isinstance(records, dict) else ""
            raise UserError(
                f"{path} holds one JSON {_JSON_TYPES.get(type(records), 'value')}{keys}, not a list of records; "
                "make it a list or JSONL"
            )
        try:
            texts = [json.dumps(record).encode() for record in records[:limit]]
        except RecursionError:
            raise UserError(f"{path} holds lists or objects nested too deeply; mend the file") from None
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


_JSON_TYPES = {dict: "object", str: "text", int: "number", float: "number", bool: "truth value"}


def _whole(path: Path) -> bytes:
    """The content of a file that has to be read whole."""
    with path.open("rb") as file:
        if b"\0" in file.read(4096):
            raise UserError(f"{path} is not valid JSON: it begins with zero bytes; fetch it again")
        if path.stat().st_size > MAX_WHOLE:
            raise UserError(f"{path} is larger than {MAX_WHOLE >> 30} GiB, too large for one JSON value; write JSONL")
        file.seek(0)
        return file.read()


def _unpacked(path: Path) -> bytes:
    """The content of a ``.gz`` file, which cannot be read at a place of its own."""
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_WHOLE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a sound gzip file ({error}); fetch it again") from None
    if len(content) > MAX_WHOLE:
        raise UserError(f"{path} unpacks to more than {MAX_WHOLE >> 30} GiB, too much for memory; unpack it on disk")
    return content


class HuggingFaceSource(Source):
    """Rows of a ``datasets.Dataset``. Images stay encoded until ``load_image`` checks and decodes them.

    Args:
        dataset: the data set; its own format and transforms are not used.
        limit: only the first so many rows.
    """

    def __init__(self, dataset: Any, name: str, images: Path, *, limit: int | None = None, **shared: Any) -> None:
        super().__init__(name, images, **shared)
        if limit is not None:
            dataset = dataset.select(range(min(limit, len(dataset))))
        self._features = without_media(dataset.features)
        self._rows = dataset.with_format("arrow")
        ours = {theirs: name for name, theirs in self.columns.items()}
        texts = [column for column in dataset.column_names if ours.get(column, column) in TEXT_COLUMNS]
        self._texts = self._rows.select_columns(texts)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Any:
        return self._features.decode_example(self._rows[index].to_pylist()[0])

    def size(self, index: int) -> int:
        return _characters(self._texts[index].to_pylist()) if self._texts.column_names else 0

    def only_text(self) -> HuggingFaceSource:
        """The same rows with their column of texts alone. Raises ``UserError`` where there is none."""
        column = self.columns.get("text", "text")
        if column not in self._rows.column_names:
            found = ", ".join(self._rows.column_names)
            raise UserError(f"{self.name} has no column {column}, but {found}; name it with columns: {{text: …}}")
        rows = self._rows.select_columns(column)
        return HuggingFaceSource(
            rows if column == "text" else rows.rename_column(column, "text"), self.name, self.images
        )

    def sizes(self) -> NDArray[np.int64]:
        if self._rows.column_names != ["text"]:
            return super().sizes()
        import pyarrow.compute  # which knows lengths without reading the texts

        found = []
        for table in self._rows.iter(batch_size=100_000):
            lengths = pyarrow.compute.fill_null(pyarrow.compute.binary_length(table["text"]), 0)
            found.append(lengths.to_numpy().astype(np.int64))
        return np.concatenate(found)


def without_media(feature: Any) -> Any:
    """Features that leave images, sound and video as stored. JSON columns (data sets 5) are still parsed."""
    if isinstance(feature, dict):
        return type(feature)({key: without_media(value) for key, value in feature.items()})
    if isinstance(feature, list):
        return [without_media(value) for value in feature]
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=without_media(feature.feature))
    if hasattr(feature, "decode") and type(feature).__name__ != "Json":
        return dataclasses.replace(feature, decode=False)
    return feature


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    return sum(map(_characters, value))


class TextFiles(Source):
    """Text files, each a record ``{"text": …}``.

    Args:
        paths: of the files.
        folder: where they were found; a link that leads out of it is not followed.
    """

    def __init__(self, paths: Sequence[Path], name: str, folder: Path | None = None) -> None:
        super().__init__(name, Path())
        self.paths = list(paths)
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
    """Plain text, in rows of bounded length: documents, long ones in pieces.

    It is indexed as a :class:`Source` is, and gives a :class:`~data.conversation.Document` for each row. How many
    pieces a document has is known from its size, without reading it. They are equally long, to the next white space.

    Args:
        records: where each record has its document under ``text``.
        characters: about the most in a row.
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

    def _place(self, index: int) -> tuple[int, int]:
        """The document of a row, and which of its pieces the row is."""
        document = int(np.searchsorted(self._first, index, side="right")) - 1
        return document, index - int(self._first[document])

    def size(self, index: int) -> int:
        return int(self._sizes[self._place(index)[0]])

    def line(self, index: int) -> int:
        return self.records.line(self._place(index)[0])

    def __getitem__(self, index: int) -> Document:
        """The row at ``index``. Raises ``BadSample`` where there is no text, ``IndexError`` past the end."""
        index = range(len(self))[index]
        document, piece = self._place(index)
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
    """Where one of so many equal pieces begins: at the first white space from there on, if its own text has any."""
    start, stop = piece * len(text) // pieces, (piece + 1) * len(text) // pieces
    if start in (0, len(text)):
        return start
    found = _SPACE.search(text, start, stop)
    return start if found is None else found.start()


# Opening.


def open_source(
    path_or_name: str | Path,
    *,
    images: Path | None = None,
    format: str = "auto",
    split: str | None = None,
    config: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    answers_required: bool = True,
) -> Source:
    """A source by its path or its name on the Hugging Face hub.

    Args:
        path_or_name: a JSON or JSONL file, as it is or with ``.gz``; a CSV or TSV file; a parquet or arrow file or a
            folder of them; a folder written by ``save_to_disk``; a tar file of WebDataset, a folder of them or a
            pattern such as ``mix-{0000..0127}.tar``; or ``owner/name`` of a data set on the hub.
        images: the folder that relative image paths start from; by default the folder of the file.
        format: one of :data:`FORMATS`; ``auto``: by suffix, and for JSON by its first line.
        split: which split of a Hugging Face data set, or of shards whose names tell; may be left out where there is
            only one.
        config: which configuration of a Hugging Face data set.
        name: what reports call the source; by default the file's name without suffix, or the hub name.
        limit: only the first so many rows.
        columns: our name for a key (:data:`data.layouts.COLUMNS`): the key that the records have for it.
        answers_required: whether a record without an assistant's answer is a bad sample (for training, yes).

    Raises:
        UserError: nothing is there, it has no rows, its format is not known, or no record has a key of ``columns``.
    """
    path, given = Path(path_or_name), str(path_or_name)
    if limit is not None and limit < 1:
        raise UserError(f"limit of {given} is {limit}; it must be at least 1, or left out for all rows")
    if images is not None and not images.is_dir():
        raise UserError(f"image folder {images} of {given} does not exist; correct `images`")
    if unknown := next((ours for ours in columns or {} if ours not in COLUMNS), None):
        raise UserError(f"columns of {given} names {unknown!r}; known are {', '.join(COLUMNS)}")
    kind = _format(path, given, format)
    if kind not in ("huggingface", "webdataset") and (split or config):
        raise UserError(f"{given} is a {kind} file and has no split or config; leave them out")
    shared: dict[str, Any] = {"limit": limit, "answers_required": answers_required, "columns": columns}
    folder = images or (path if path.is_dir() else path.parent if path.exists() else Path())
    source: Source
    if kind == "huggingface":
        title = name or (path.stem if path.is_file() else path.name if path.exists() else given)
        source = HuggingFaceSource(open_dataset(path, given, split, config), title, folder, **shared)
    elif kind == "webdataset":
        if config or images:
            raise UserError(f"{given} is read as WebDataset, which has no config or image folder; leave it out")
        source = _open_shards(path, given, split, name, shared)
    elif kind in ("csv", "tsv"):
        source = _open_table(path, kind, name, folder, shared)
    else:
        source = _open_json(path, kind, format, name, folder, shared)
    if not len(source):
        raise UserError(f"{given} has no rows; check the file{' and the split' if split else ''}")
    _check_columns(source, given)
    return source


def _open_shards(path: Path, given: str, split: str | None, name: str | None, shared: Mapping[str, Any]) -> Source:
    from .webdataset import WebDatasetSource  # a Source, and so later than this file

    title = name or (path.stem if path.exists() else path.parent.name or str(path))
    return WebDatasetSource(find_shards(path, given, split), title, **shared)


def _open_table(path: Path, kind: str, name: str | None, folder: Path, shared: Mapping[str, Any]) -> Source:
    from .delimited import DelimitedSource  # a Source, and so later than this file

    return DelimitedSource(path, name or path.stem, folder, delimiter="," if kind == "csv" else "\t", **shared)


def _open_json(
    path: Path, kind: str, format: str, name: str | None, folder: Path, shared: Mapping[str, Any]
) -> JsonlSource | JsonSource:
    packed = path.suffix.lower() == ".gz"
    text = _unpacked(path) if packed else None
    if format == "auto":
        kind = _json_kind(path, text, kind)
    reader = JsonlSource if kind == "jsonl" else JsonSource
    return reader(path, name or (Path(path.stem).stem if packed else path.stem), folder, text=text, **shared)


def _json_kind(path: Path, text: bytes | None, kind: str) -> str:
    """``jsonl`` or ``json``: one object a line under the name .json is common, and so is one value under .jsonl."""
    with path.open("rb") if text is None else io.BytesIO(text) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if kind == "json" and not start.startswith(b"{"):
            return "json"
        file.seek(0)
        lines = (line for line in bounded_lines(path, file) if not line.isspace())
        first, alone = next(lines, b"").removeprefix(b"\xef\xbb\xbf"), next(lines, None) is None
        try:
            value = json.loads(first)
        except (ValueError, RecursionError):
            pass
        else:
            # A file of one line is what its name says, but for a list, which is no record.
            whole = alone and (kind == "json" or isinstance(value, list))
            return "json" if whole else "jsonl"
        # The first line is no JSON: either it is broken, or a value goes over several lines.
        if not start.startswith((b"{", b"[")):
            return kind
        file.seek(0)
        content = file.read(MAX_WHOLE + 1)
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return "jsonl"
    return "json"


def _check_columns(source: Source, given: str) -> None:
    """Raise ``UserError`` where ``columns`` names a key that no record has. Mostly the first record has them all."""
    missing = set(source.columns.values())
    found: dict[str, None] = {}
    for index in range(len(source)) if missing else ():
        try:
            record = source.read(index)
        except BadSample:
            continue
        if isinstance(record, Mapping):
            missing -= record.keys()
            found |= dict.fromkeys(map(str, record)) if len(found) < 100 else {}
        if not missing:
            return
    if missing:
        raise UserError(
            f"columns of {given}: no record has the key {', '.join(sorted(missing))}; "
            f"there are {', '.join(found)[:300] or 'none'}"
        )


def open_text(
    path_or_name: str | Path,
    characters: int,
    *,
    split: str | None = None,
    config: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> TextSource:
    """Plain text by its path or its name on the Hugging Face hub.

    Args:
        path_or_name: a ``.txt`` file, which is one document, or a folder of such; or what :func:`open_source` reads,
            with the documents under the key, or in the column, ``text``.
        characters: about the most in a row: longer documents are several.
        split, config, name, columns: as in :func:`open_source`.
        limit: only the first so many documents.

    Raises:
        UserError: as in :func:`open_source`, or a data set has no such column.
    """
    path = Path(path_or_name)
    inside = sorted(file for file in path.rglob("*") if _is_text(file)) if path.is_dir() else []
    files = inside or ([path] if _is_text(path) else [])
    if files:
        return TextSource(TextFiles(files[:limit], name or path.stem, path if inside else None), characters)
    records = open_source(path_or_name, split=split, config=config, name=name, limit=limit, columns=columns)
    if isinstance(records, HuggingFaceSource):
        records = records.only_text()
    return TextSource(records, characters)


def _format(path: Path, given: str, format: str) -> str:
    """The reader for what the path names, after checking that something is there."""
    if format not in FORMATS:
        raise UserError(f"unknown data format {format!r} for {given}; known are {', '.join(FORMATS)}")
    if not path.exists() and is_shard_pattern(given) and format in ("auto", "webdataset"):
        return "webdataset"
    if not path.exists():
        looks_like_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", given) and path.suffix not in _SUFFIXES
        if format == "huggingface" or (format == "auto" and looks_like_hub_name):
            return "huggingface"
        raise UserError(f"data file {given} does not exist; check the path (relative ones start at {Path.cwd()})")
    if path.is_dir():
        if format in ("json", "jsonl"):
            raise UserError(f"{given} is a folder; name the {format} file in it")
        if format == "webdataset" or (format == "auto" and any(path.glob("*.tar"))):
            return "webdataset"
        return "huggingface"
    check_regular(path)
    if format != "auto":
        return format
    suffix = path.suffix.lower()
    packed = suffix == ".gz"
    kind = _SUFFIXES.get(Path(path.stem).suffix.lower() if packed else suffix)
    if kind is None or (packed and kind not in _UNPACKABLE):
        raise UserError(
            f"cannot tell the format of {given} from its suffix; "
            + ("unpack it" if packed else f"set `format` to one of {', '.join(FORMATS[1:])}, or unpack it first")
        )
    return kind


def _is_text(path: Path) -> bool:
    return path.suffix.lower() == ".txt" and path.is_file()
