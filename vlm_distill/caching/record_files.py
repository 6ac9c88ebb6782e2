"""How records are stored: appended by any number of writers, or in arrays of fixed size that processes share."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from numpy.lib.format import open_memmap

from data.errors import UserError

# Records are flushed after this many bytes or seconds, which limits what a killed process loses.
_FLUSH_BYTES, _FLUSH_SECONDS = 2**26, 5.0


class RecordFiles:
    """The records that all writers have appended to a cache, memory-mapped.

    Each writer has two files of its own: ``NAME.data``, its records' data one after the other, and ``NAME.index``, an
    entry for each. An entry that is cut off, or whose data are, does not count.

    Args:
        folder: of a cache.
        entry: the fields of an index entry; two of them are ``offset`` (into the data) and ``check`` (their CRC-32).
        sizes: returns the number of bytes of some entries' data.

    Attributes:
        entries: the complete entries of all writers.
    """

    def __init__(self, folder: Path, entry: np.dtype[Any], sizes: Callable[[Any], Any]) -> None:
        self._sizes = sizes
        self._paths = sorted(path.with_suffix("") for path in folder.glob("*.index"))
        parts, owners = [np.empty(0, entry)], [np.empty(0, np.int64)]
        for number, path in enumerate(self._paths):
            raw = path.with_suffix(".index").read_bytes()
            found = np.frombuffer(raw, entry, count=len(raw) // entry.itemsize)
            data = path.with_suffix(".data")
            whole = found["offset"] + sizes(found) <= (data.stat().st_size if data.exists() else 0)
            parts.append(found[whole])
            owners.append(np.full(len(parts[-1]), number))
        self.entries, self._owners = np.concatenate(parts), np.concatenate(owners)
        self._maps: dict[int, np.memmap[Any, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # pickling a map would copy the data

    def data(self, number: int) -> Any:
        """Return the data of the entry with this number, uint8."""
        entry, owner = self.entries[number], int(self._owners[number])
        if owner not in self._maps:
            self._maps[owner] = np.memmap(self._paths[owner].with_suffix(".data"), np.uint8, "r")
        return self._maps[owner][entry["offset"] : entry["offset"] + int(self._sizes(entry))]

    def checked(self, number: int) -> Any:
        """Read and return the data of an entry. Raise ``UserError`` if they are damaged."""
        data = self.data(number)
        if zlib.crc32(data) != self.entries[number]["check"]:
            path = self._paths[int(self._owners[number])]
            raise UserError(f"{path}.data is damaged; delete it and {path.name}.index, and run vlm-distill cache")
        return data


class RecordWriter:
    """Appends records to one process's own two files of a cache. Call ``close``, or the last records are lost.

    An entry is written after its data have reached the disk, so an entry that exists is valid.

    Args:
        folder: of a cache.
        entry: as for :class:`RecordFiles`; ``append`` takes its other fields by name.

    Raises:
        UserError: (by every method) the disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path, entry: np.dtype[Any]) -> None:
        self._path, self._entry = folder / uuid4().hex, entry
        self._files: list[BinaryIO] = []
        self._entries: list[tuple[int, ...]] = []
        self._offset = self._pending = 0
        self._flushed = time.monotonic()

    def append(self, data: bytes, **fields: int) -> None:
        """Append a record: its data, and its entry with these fields."""
        known = {**fields, "offset": self._offset, "check": zlib.crc32(data)}
        assert self._entry.names is not None
        with _written(self._path):
            if not self._files:
                self._files = [self._path.with_suffix(suffix).open("xb") for suffix in (".data", ".index")]
            self._files[0].write(data)
        self._entries.append(tuple(known[name] for name in self._entry.names))
        self._offset += len(data)
        self._pending += len(data)
        if self._pending > _FLUSH_BYTES or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring all records to the disk: data first, then the entries."""
        if self._entries:
            data, index = self._files
            with _written(self._path):
                _sync(data)
                index.write(np.array(self._entries, self._entry).tobytes())
                _sync(index)
        self._entries, self._pending, self._flushed = [], 0, time.monotonic()

    def close(self) -> None:
        self.flush()
        for file in self._files:
            file.close()


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path.parent}: the cache cannot be written: {error.strerror}; fix that and run vlm-distill cache again, "
            "which continues with what is missing"
        ) from None


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class RecordArrays(dict[str, "np.memmap[Any, Any]"]):
    """Arrays of fixed shapes, memory-mapped as ``NAME.npy``, which any number of processes read and write in place.

    Args:
        folder: of a cache.
        layout: shape and dtype by name.

    Raises:
        UserError: a file is unreadable, or of another shape or dtype.
    """

    def __init__(self, folder: Path, layout: Mapping[str, tuple[tuple[int, ...], type]]) -> None:
        super().__init__()
        for name, (shape, dtype) in layout.items():
            path = folder / f"{name}.npy"
            try:
                array = open_memmap(path, mode="r+")
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read: {error}; delete the folder to fill it again") from None
            if array.shape != shape or array.dtype != dtype:
                found, wanted = f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {shape}"
                raise UserError(f"{path}: {found} is not {wanted}; delete the folder")
            self[name] = array

    @staticmethod
    def create(folder: Path, layout: Mapping[str, tuple[tuple[int, ...], type]]) -> None:
        """Create the files, filled with zeros."""
        for name, (shape, dtype) in layout.items():
            open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape).flush()
