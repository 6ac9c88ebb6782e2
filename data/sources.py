"""Readers: JSON, JSONL, Hugging Face data sets and plain text as indexable sources of conversations or documents.

WebDataset shards have a reader of their own, webdataset.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .conversation import Conversation, Document
from .errors import BadSample, UserError
from .layouts import TEXT_COLUMNS, to_conversation
from .places import check_regular, choose_split
from .tars import find_shards, is_shard_pattern

FORMATS = ("auto", "json", "jsonl", "huggingface", "webdataset")
#: Of English, about: a row of plain text is cut to have about as many tokens as may stand in one.
CHARACTERS_PER_TOKEN = 4

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "huggingface",
    ".arrow": "huggingface",
    ".tar": "webdataset",
}
_SPACE = re.compile(r"\s")


class Source(ABC):
    """Conversations by index, ``source[0]`` to ``source[len(source) - 1]``.

    A source can be pickled and inherited by worker processes: it holds no open file.

    Args:
        name: what reports call it.
        images: the folder that relative image paths start from.
        answers_required: whether a record without an assistant's answer is a bad sample.
    """

    def __init__(self, name: str, images: Path, answers_required: bool = True) -> None:
        self.name = name
        self.images = images
        self.answers_required = answers_required

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, index: int) -> Any:
        """The raw record. Raises ``BadSample`` where it cannot be read."""

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
            )
        except RecursionError:  # lists in lists in lists, where JSON allows them
            raise BadSample("nested too deeply", "a list or object in the record") from None


class JsonlSource(Source):
    """A file with one JSON record a line, indexed by byte offset once and read line by line. Blank lines do not count.

    Args:
        path: the file.
        limit: only the first so many records.
    """

    def __init__(
        self, path: Path, name: str, images: Path, *, limit: int | None = None, answers_required: bool = True
    ) -> None:
        super().__init__(name, images, answers_required)
        self.path = path
        spans = array("q")
        with path.open("rb") as file:
            for number, start, length in islice(_spans(file), limit):
                spans.extend((number, start, length))
        # Arrays, not lists: worker processes share them without touching reference counts.
        self._lines, self._starts, self._lengths = np.array(spans, dtype=np.int64).reshape(-1, 3).T.copy()

    def __len__(self) -> int:
        return len(self._starts)

    def record(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            raw = file.read(self._lengths[index])
        if len(raw) < self._lengths[index]:
            raise UserError(
                f"{self.path} ends before its line {self.line(index)}; it has changed since the run began: "
                "put it back, and start the run again to resume"
            )
        try:
            return json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise BadSample("invalid UTF-8", str(error)) from None
        except (ValueError, RecursionError) as error:
            raise BadSample("invalid JSON", str(error)) from None

    def size(self, index: int) -> int:
        return int(self._lengths[index])

    def sizes(self) -> NDArray[np.int64]:
        return self._lengths

    def line(self, index: int) -> int:
        return int(self._lines[index])


def _spans(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and length of each line that is not blank."""
    start = 0
    for number, line in enumerate(file, 1):
        if not line.isspace():
            yield number, start, len(line)
        start += len(line)


class JsonSource(Source):
    """A file with one JSON list of records.

    The records are kept as text in one block of memory, which worker processes share; as Python objects a large file
    would be copied into each of them.

    Args:
        path: the file.
        limit: only the first so many records.

    Raises:
        UserError: the file is not valid JSON, or not a list.
    """

    def __init__(
        self, path: Path, name: str, images: Path, *, limit: int | None = None, answers_required: bool = True
    ) -> None:
        super().__init__(name, images, answers_required)
        try:
            records = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}; mend the file, or name its format") from None
        if not isinstance(records, list):
            raise UserError(
                f"{path} holds a JSON {type(records).__name__}, not a list of records; make it a list or JSONL"
            )
        try:
            texts = [json.dumps(record).encode() for record in records[:limit]]
        except RecursionError:
            raise UserError(f"{path} holds lists or objects nested too deeply; mend the file") from None
        self._text = b"".join(texts)
        self._ends = np.cumsum([0, *map(len, texts)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def record(self, index: int) -> Any:
        return json.loads(self._text[self._ends[index] : self._ends[index + 1]])

    def size(self, index: int) -> int:
        return int(self._ends[index + 1] - self._ends[index])


class HuggingFaceSource(Source):
    """Rows of a ``datasets.Dataset``. Images stay encoded until ``load_image`` checks and decodes them.

    Args:
        dataset: the data set; its own format and transforms are not used.
        limit: only the first so many rows.
    """

    def __init__(
        self, dataset: Any, name: str, images: Path, *, limit: int | None = None, answers_required: bool = True
    ) -> None:
        super().__init__(name, images, answers_required)
        if limit is not None:
            dataset = dataset.select(range(min(limit, len(dataset))))
        self._features = without_media(dataset.features)
        self._rows = dataset.with_format("arrow")
        self._texts = self._rows.select_columns([c for c in dataset.column_names if c in TEXT_COLUMNS])

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Any:
        return self._features.decode_example(self._rows[index].to_pylist()[0])

    def size(self, index: int) -> int:
        return _characters(self._texts[index].to_pylist()) if self._texts.column_names else 0

    def only_text(self) -> HuggingFaceSource:
        """The same rows with their column ``text`` alone. Raises ``UserError`` where there is none."""
        if "text" not in self._rows.column_names:
            raise UserError(f"{self.name} has no column text, but {', '.join(self._rows.column_names)}; rename one")
        return HuggingFaceSource(self._rows.select_columns("text"), self.name, self.images)

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

    def record(self, index: int) -> Any:
        path = self.paths[index]
        if self.folder is not None and not path.resolve().is_relative_to(self.folder.resolve()):
            raise BadSample("file outside the folder", str(path))
        try:
            return {"text": path.read_text("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise BadSample("invalid UTF-8", f"{path.name}: {error}") from None

    def size(self, index: int) -> int:
        return self.paths[index].stat().st_size


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
    answers_required: bool = True,
) -> Source:
    """A source by its path or its name on the Hugging Face hub.

    Args:
        path_or_name: a JSON or JSONL file; a parquet or arrow file or a folder of them; a folder written by
            ``save_to_disk``; a tar file of WebDataset, a folder of them or a pattern such as ``mix-{0000..0127}.tar``;
            or ``owner/name`` of a data set on the hub.
        images: the folder that relative image paths start from; by default the folder of the file.
        format: ``json``, ``jsonl``, ``huggingface``, ``webdataset``, or ``auto``: by suffix, and for ``.json`` by its
            first character.
        split: which split of a Hugging Face data set, or of shards whose names tell; may be left out where there is
            only one.
        config: which configuration of a Hugging Face data set.
        name: what reports call the source; by default the file's name without suffix, or the hub name.
        limit: only the first so many rows.
        answers_required: whether a record without an assistant's answer is a bad sample (for training, yes).

    Raises:
        UserError: nothing is there, it has no rows, or its format is not known.
    """
    path = Path(path_or_name)
    if limit is not None and limit < 1:
        raise UserError(f"limit of {path_or_name} is {limit}; it must be at least 1, or left out for all rows")
    if images is not None and not images.is_dir():
        raise UserError(f"image folder {images} of {path_or_name} does not exist; correct `images`")
    kind = _format(path, str(path_or_name), format)
    if kind in ("json", "jsonl") and (split or config):
        raise UserError(f"{path_or_name} is a {kind} file and has no split or config; leave them out")
    folder = images or (path if path.is_dir() else path.parent if path.exists() else Path())
    source: Source
    if kind == "huggingface":
        title = name or (path.stem if path.is_file() else path.name if path.exists() else str(path_or_name))
        dataset = open_dataset(path, str(path_or_name), split, config)
        source = HuggingFaceSource(dataset, title, folder, limit=limit, answers_required=answers_required)
    elif kind == "webdataset":
        from .webdataset import WebDatasetSource  # a Source, and so later than this file

        if config or images:
            raise UserError(f"{path_or_name} is read as WebDataset, which has no config or image folder; leave it out")
        shards = find_shards(path, str(path_or_name), split)
        title = name or (path.stem if path.exists() else path.parent.name or str(path))
        source = WebDatasetSource(shards, title, limit=limit, answers_required=answers_required)
    else:
        reader = JsonlSource if kind == "jsonl" else JsonSource
        source = reader(path, name or path.stem, folder, limit=limit, answers_required=answers_required)
    if not len(source):
        raise UserError(f"{path_or_name} has no rows; check the file{' and the split' if split else ''}")
    return source


def open_text(
    path_or_name: str | Path,
    characters: int,
    *,
    split: str | None = None,
    config: str | None = None,
    name: str | None = None,
    limit: int | None = None,
) -> TextSource:
    """Plain text by its path or its name on the Hugging Face hub.

    Args:
        path_or_name: a ``.txt`` file, which is one document, or a folder of such; or what :func:`open_source` reads,
            with the documents under the key, or in the column, ``text``.
        characters: about the most in a row: longer documents are several.
        split, config, name: as in :func:`open_source`.
        limit: only the first so many documents.

    Raises:
        UserError: as in :func:`open_source`, or a data set has no such column.
    """
    path = Path(path_or_name)
    inside = sorted(file for file in path.rglob("*") if _is_text(file)) if path.is_dir() else []
    files = inside or ([path] if _is_text(path) else [])
    if files:
        return TextSource(TextFiles(files[:limit], name or path.stem, path if inside else None), characters)
    records = open_source(path_or_name, split=split, config=config, name=name, limit=limit)
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
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"cannot tell the format of {given} from its suffix; set `format` to one of {', '.join(FORMATS[1:])}"
        )
    if kind == "json":
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        # One object after another under the name .json is common.
        return "jsonl" if start.startswith(b"{") else "json"
    return kind


def _is_text(path: Path) -> bool:
    return path.suffix.lower() == ".txt" and path.is_file()


def open_dataset(path: Path, given: str, split: str | None, config: str | None) -> Any:
    import datasets  # takes seconds to import; JSON files do without

    if path.is_file() or (path / "state.json").is_file():
        if split or config:
            raise UserError(f"{given} is a single table and has no split or config; leave them out")
        if path.is_dir():
            return _loaded(given, lambda: datasets.load_from_disk(str(path)))
        kind = "arrow" if path.suffix.lower() == ".arrow" else "parquet"
        return _loaded(given, lambda: datasets.load_dataset(kind, data_files=str(path), split="train"))
    if (path / "dataset_dict.json").is_file():
        tables = _loaded(given, lambda: datasets.load_from_disk(str(path)))
        return tables[choose_split(given, split, list(tables))]
    if path.is_dir() and not any(file.suffix in (".parquet", ".arrow") for file in path.rglob("*")):
        raise UserError(f"folder {given} holds no parquet or arrow file; for JSON or JSONL, name the file in it")
    splits = _loaded(given, lambda: datasets.get_dataset_split_names(given, config_name=config))
    chosen = choose_split(given, split, splits)
    return _loaded(given, lambda: datasets.load_dataset(given, name=config, split=chosen))


def open_parquet(files: Sequence[Path]) -> Any:
    """A data set of several parquet files, rows in the order of the files."""
    import datasets

    names = [str(file) for file in files]
    return _loaded(names[0], lambda: datasets.load_dataset("parquet", data_files=names, split="train"))


def _loaded(given: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # the library raises many kinds: no such name, no network, no such configuration
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot open {given} as a local path or a Hugging Face data set: {reason[:300]}") from None
