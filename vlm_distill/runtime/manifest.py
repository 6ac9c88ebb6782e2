"""Manifests: size and checksum of every file in a folder, written last, compared before the files are read."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from data.errors import UserError
from data.saved_json import read_object

NAME = "manifest.json"
#: Bytes read and hashed at once.
_CHUNK = 2**22


class Damaged(UserError):
    """A file differs from its manifest, or the manifest is missing or unreadable."""


@dataclass(frozen=True)
class Entry:
    """A file's size in bytes and its XXH3 checksum of 64 bits, in hexadecimal."""

    size: int
    xxh3: str


class HashedWriter:
    """A file that is hashed while it is written from beginning to end.

    Args:
        file: open for writing, in binary mode.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self._size = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def entry(self) -> Entry:
        """Size and checksum of what has been written."""
        return Entry(self._size, self._hash.hexdigest())


def hash_file(path: Path) -> Entry:
    """Return a file's size and checksum, reading all of it."""
    found, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            size += len(chunk)
    return Entry(size, found.hexdigest())


def entries_of(
    folder: Path, known: Mapping[str, Entry] | None = None, left_out: Container[str] = (NAME,)
) -> dict[str, Entry]:
    """Return the entries of all files under a folder by their relative paths.

    Args:
        folder: its files are read, except those that are known.
        known: entries of files that were hashed while they were written, perhaps by other machines.
        left_out: files without an entry, such as the manifest itself.
    """
    found = dict(known or {})
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in left_out and name not in found:
            found[name] = hash_file(path)
    return dict(sorted(found.items()))


def write(folder: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Write the manifest of a folder whose files are on disk already, and wait until it is on disk too."""
    files = {name: {"size": entry.size, "xxh3": entry.xxh3} for name, entry in entries_of(folder, known).items()}
    with (folder / NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": 1, "files": files}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Entry]:
    """Return the entries of a folder's manifest. Raise ``Damaged`` if it is missing or unreadable."""
    path = folder / NAME
    if not path.is_file():
        raise Damaged(f"{path}: missing")
    try:
        content = read_object(path, {"format": int, "files": dict[str, dict[str, int | str]]})
        if content["format"] != 1:
            raise UserError(f"{path}: written by a later version (format {content['format']})")
        return entries_from(content["files"])
    except UserError as error:
        raise Damaged(str(error)) from None
    except (KeyError, TypeError):
        raise Damaged(f"{path}: a file has no size or no checksum in it") from None


def entries_from(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Entry]:
    """Return entries from their JSON form ``{name: {"size": …, "xxh3": …}}``."""
    return {name: Entry(**cast(Any, about)) for name, about in files.items()}


def check(folder: Path, files: Mapping[str, Entry], names: Sequence[str] | None = None) -> None:
    """Raise ``Damaged`` if a file is missing or has another size or checksum; sizes are compared first.

    Args:
        folder: the files; those without an entry do not matter.
        files: their entries.
        names: the files to check; ``None`` for all.
    """
    wanted = list(files) if names is None else names
    for name in wanted:
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise Damaged(f"{path}: missing")
        if size != files[name].size:
            raise Damaged(f"{path}: {size:,} bytes instead of {files[name].size:,}")
    for name in wanted:
        try:
            found = hash_file(folder / name)
        except OSError as error:
            raise Damaged(f"{folder / name}: cannot be read: {error.strerror}") from None
        if found != files[name]:
            raise Damaged(f"{folder / name}: its content has changed (another checksum)")
