"""Open a data source by its path or hub name: find its format and make the reader for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .datasets_library import open_dataset
from .delimited import DelimitedSource
from .errors import BadSample, UserError
from .huggingface import HuggingFaceSource
from .in_memory import PREFIX, held_samples, open_held
from .json_sources import open_json
from .layouts import COLUMNS
from .paths import check_regular, folder_of
from .plain_text import TextFiles, TextSource
from .plugin_layouts import PluginLayout
from .sources import Source
from .tars import find_shards, is_shard_pattern
from .webdataset import WebDatasetSource

FORMATS = ("auto", "json", "jsonl", "csv", "tsv", "huggingface", "webdataset")

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


def open_source(
    path_or_name: str | Path,
    *,
    images: Path | None = None,
    format: str = "auto",
    split: str | None = None,
    config: str | None = None,
    name: str | None = None,
    skip: int = 0,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    layout: str | None = None,
    answers_required: bool = True,
) -> Source:
    """Open a source by its path or its name on the Hugging Face hub.

    Args:
        path_or_name: a JSON or JSONL file, plain or ``.gz``; a CSV or TSV file; a parquet or arrow file or a folder of
            them; a folder written by ``save_to_disk``; a WebDataset tar file, a folder of them or a pattern such as
            ``mix-{0000..0127}.tar``; the ``owner/name`` of a data set on the hub; or the name of samples in memory
            (:func:`~data.in_memory.samples_in_memory`).
        images: the folder that relative image paths start from; by default the folder of the file.
        format: one of :data:`FORMATS`; ``auto`` decides by suffix, and for JSON by its first line.
        split: the split of a Hugging Face data set, or of shards named by split; optional if there is only one.
        config: the configuration of a Hugging Face data set.
        name: the name in reports; by default the file's name without suffix, or the hub name.
        skip: leave out this many samples, the first ones.
        limit: read only ``limit`` samples, the first ones after those.
        columns: maps our name for a key (:data:`data.layouts.COLUMNS`) to the key that the records use.
        layout: a layout from outside (:class:`~data.plugin_layouts.PluginLayout`) that the records have.
        answers_required: whether a record without an assistant's answer is a bad sample (in training it is).

    Raises:
        UserError: the path does not exist, has no samples or an unknown format, or no record has a key of ``columns``.
    """
    path, given = Path(path_or_name), str(path_or_name)
    _check_options(given, images, skip, limit, columns, layout)
    held = held_samples(given)
    kind = _format(path, given, format) if held is None else "memory"
    _check_kind(given, kind, split, config, images)

    shared: dict[str, Any] = {"rows": _rows(skip, limit), "answers_required": answers_required, "columns": columns}
    shared["layout"] = None if layout is None else PluginLayout(layout)
    folder = images or folder_of(path)
    if kind == "memory":
        source: Source = open_held(held, name or given.removeprefix(PREFIX), folder, **shared)
    elif kind == "huggingface":
        dataset = open_dataset(path, given, split, config)
        source = HuggingFaceSource(dataset, name or _dataset_name(path, given), folder, **shared)
    elif kind == "webdataset":
        shards = find_shards(path, given, split)
        source = WebDatasetSource(shards, name or _shards_name(path), **shared)
    elif kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        source = DelimitedSource(path, name or path.stem, folder, delimiter=delimiter, **shared)
    else:
        source = open_json(path, kind, name, folder, detect=format == "auto", **shared)

    _check_rows(source, given, skip, split)
    _check_columns(source, given)
    return source


def _check_kind(given: str, kind: str, split: str | None, config: str | None, images: Path | None) -> None:
    """Raise ``UserError`` if an option means nothing for this kind of source."""
    if kind not in ("huggingface", "webdataset") and (split or config):
        what = "in memory" if kind == "memory" else f"a {kind} file"
        raise UserError(f"{given} is {what} and has no split or config; leave them out")
    if kind == "webdataset" and (config or images):
        raise UserError(f"{given} is read as WebDataset, which has no config or image folder; leave it out")


def _rows(skip: int, limit: int | None) -> slice:
    return slice(skip or None, None if limit is None else skip + limit)


def _check_rows(source: Source | TextSource, given: str, skip: int, split: str | None) -> None:
    """Raise ``UserError`` if nothing is left to read."""
    if not len(source):
        where = f" after the first {skip:,}; lower skip, or" if skip else ";"
        raise UserError(f"{given} has no rows{where} check the file{' and the split' if split else ''}")


def _check_options(
    given: str, images: Path | None, skip: int, limit: int | None, columns: Mapping[str, str] | None, layout: str | None
) -> None:
    """Raise ``UserError`` if an option is wrong whatever the format."""
    if skip < 0:
        raise UserError(f"skip of {given} is {skip}; it must be at least 0")
    if limit is not None and limit < 1:
        raise UserError(f"limit of {given} is {limit}; it must be at least 1, or left out for all rows")
    if images is not None and not images.is_dir():
        raise UserError(f"image folder {images} of {given} does not exist; correct `images`")
    if columns and layout is not None:
        raise UserError(f"columns of {given}: layout {layout} reads the records' own keys; leave columns or layout out")
    if unknown := next((ours for ours in columns or {} if ours not in COLUMNS), None):
        raise UserError(f"columns of {given} names {unknown!r}; known are {', '.join(COLUMNS)}")


def _dataset_name(path: Path, given: str) -> str:
    if path.is_file():
        return path.stem
    return path.name if path.exists() else given


def _shards_name(path: Path) -> str:
    if path.exists():
        return path.stem
    return path.parent.name or str(path)


def _check_columns(source: Source, given: str) -> None:
    """Raise ``UserError`` if ``columns`` names a key that no record has. Usually the first record has them all."""
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
    skip: int = 0,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> TextSource:
    """Open plain text by its path or its name on the Hugging Face hub.

    Args:
        path_or_name: a ``.txt`` file (one document) or a folder of them; or anything :func:`open_source` reads, with
            the documents under the key, or in the column, ``text``.
        characters: the approximate limit for one sample; longer documents become several.
        split, config, name, columns: as in :func:`open_source`.
        skip: leave out this many documents, the first ones.
        limit: read only ``limit`` documents, the first ones after those.

    Raises:
        UserError: as in :func:`open_source`, or a data set has no such column.
    """
    path = Path(path_or_name)
    inside = sorted(file for file in path.rglob("*") if _is_text(file)) if path.is_dir() else []
    files = inside or ([path] if _is_text(path) else [])
    if files:
        folder = path if inside else None
        texts = TextSource(TextFiles(files, name or path.stem, folder, rows=_rows(skip, limit)), characters)
        _check_rows(texts, str(path), skip, split)
        return texts
    chosen: dict[str, Any] = {"split": split, "config": config, "skip": skip, "limit": limit}
    records = open_source(path_or_name, name=name, columns=columns, **chosen)
    if isinstance(records, HuggingFaceSource):
        records = records.only_text()
    return TextSource(records, characters)


def _format(path: Path, given: str, format: str) -> str:
    """Return which reader the path needs, after checking that something is there."""
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
