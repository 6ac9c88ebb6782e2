"""A cache's folder: made whole or not at all, compared by name with what a run is about to read, filled by many."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, BinaryIO
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from data.errors import UserError
from data.json_files import read_object
from vlm_distill.runtime import manifest
from vlm_distill.runtime.lock import Taken, hold, holder

ABOUT = "cache.json"
# Written out after so many bytes or seconds: what a kill costs.
_FLUSH_BYTES, _FLUSH_SECONDS = 2**26, 5.0


def make_folder(
    folder: Path,
    what: str,
    about: Mapping[str, Any],
    fill: Callable[[Path], None],
    changing: Container[str] = (),
) -> None:
    """Make the folder under another name first: of several processes one gives it its place.

    Args:
        folder: what stands there already, if it is a cache, is left alone.
        what: is cached, for messages.
        about: goes into ``cache.json``, with its own checksum and those of the other files.
        fill: writes everything else.
        changing: files that get no checksum here, since they change while the cache fills.

    Raises:
        UserError: there is something else, or nothing may be written.
    """
    made = folder.with_name(f"{folder.name}.{uuid4().hex}")
    try:
        made.mkdir(parents=True)
        try:
            fill(made)
            entries = manifest.entries_of(made, left_out=changing)
            content = {**about, "files": {name: asdict(entry) for name, entry in entries.items()}}
            content["checksum"] = _checksum(content)
            (made / ABOUT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            made.rename(folder)
        except OSError:
            # Another process was first, or there is a folder with something else in it.
            if not (folder / ABOUT).exists():
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except Exception as error:
        # What libraries in Rust write fails with the system's error in words alone.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{folder}: cannot make the cache of {what}: {reason}; name an empty folder that may be written"
        ) from None


@contextmanager
def filling(folder: Path, key: str) -> Iterator[None]:
    """Around the filling of a cache by a command, of which one at a time may do that.

    The file that it holds lies beside the folder, which may not be there yet. Where none can be held, as on file
    systems without locks, everyone may fill.

    Args:
        folder: of the cache.
        key: of the configuration, for messages.

    Raises:
        UserError: another command is filling it.
    """
    held: IO[str] | None = None
    path = _lock_of(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = hold(path)
    except Taken as other:
        raise UserError(
            f"{key}: {folder}: {other} is filling it; wait for it, or stop it and run vlm-distill cache again, which "
            "goes on with what is missing"
        ) from None
    except OSError:
        pass  # what cannot be written is told by what writes the cache itself
    try:
        yield
    finally:
        if held is not None:
            held.close()


def check_not_filling(folder: Path, key: str) -> None:
    """Raises ``UserError`` where a command is filling a cache that a run is about to read."""
    other = holder(_lock_of(folder))
    if other is not None:
        raise UserError(f"{key}: {folder}: {other} is filling it; start the run when that is done")


def _lock_of(folder: Path) -> Path:
    real = folder.resolve()
    return real.with_name(f".{real.name}.lock")


def read_about(folder: Path, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what ``cache.json`` says, checksums left out.

    Args:
        folder: of a cache.
        shape: keys that must be there, and their types.

    Raises:
        UserError: it cannot be read or is not what was written, or one of the files that never change is not.
    """
    path = folder / ABOUT
    try:
        found = read_object(path, shape)
        checksum = found.pop("checksum", None)
        if checksum is None:
            raise UserError(f"{path}: has no checksum (an earlier version wrote it)")
        if checksum != _checksum(found):
            raise UserError(f"{path}: is not what was written there (another checksum)")
        manifest.check(folder, manifest.entries_from(found.pop("files")))
    except UserError as error:
        raise UserError(f"{error}; put it back from a copy, or delete {folder} to fill it anew") from None
    return found


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def compare(folder: Path, what: str, found: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Raises ``UserError`` where a cache is of something else than ``identity`` says."""
    for key in [*identity, *(key for key in found if key not in identity)]:
        old, new = found.get(key, "none"), identity.get(key, "none")
        if old != new:
            raise UserError(
                f"{folder}: its {what} are of another {key}: {old} there, {new} here; name another folder, or "
                "delete this one to fill it anew"
            )


def check_room(folder: Path, what: str, needed: float, remedy: str) -> None:
    """Raises ``UserError`` where fewer than ``needed`` bytes are free."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} take {in_words(needed)} and {in_words(free)} are free; make room, choose another "
            f"folder, or {remedy}"
        )


def in_words(size: float) -> str:
    """Bytes, rounded in the largest unit of which they are one at least: ``1.18 MB``."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} bytes"


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, types, shapes and bytes, in whatever order they come."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Shards:
    """What writers have put into a folder, memory-mapped: each has its own ``NAME.data`` and ``NAME.index``.

    Args:
        folder: of a cache.
        entry: what stands in an index, ``offset`` (into the data) and ``check`` (CRC-32 of them) among it.
        sizes: bytes of the data of some entries.

    Attributes:
        entries: of all writers, those whose data are whole.
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
        return self.__dict__ | {"_maps": {}}  # a map would be pickled with all that it shows

    def data(self, number: int) -> Any:
        """The data of an entry by its number, uint8."""
        entry, owner = self.entries[number], int(self._owners[number])
        if owner not in self._maps:
            self._maps[owner] = np.memmap(self._paths[owner].with_suffix(".data"), np.uint8, "r")
        return self._maps[owner][entry["offset"] : entry["offset"] + int(self._sizes(entry))]

    def checked(self, number: int) -> Any:
        """The same, all read. Raises ``UserError`` where they are damaged."""
        data = self.data(number)
        if zlib.crc32(data) != self.entries[number]["check"]:
            path = self._paths[int(self._owners[number])]
            raise UserError(f"{path}.data is damaged; delete it and {path.name}.index, and run vlm-distill cache")
        return data


class ShardWriter:
    """One process's two files of a cache. ``close`` it, so that the last of what it wrote counts.

    Entries are written after their data have reached the disk, so that one that is there says the truth.

    Args:
        folder: of a cache.
        entry: as for :class:`Shards`; its other fields are what ``append`` gets by name.

    Raises:
        UserError: of every method: the disk is full, or the folder may not be written.
    """

    def __init__(self, folder: Path, entry: np.dtype[Any]) -> None:
        self._path, self._entry = folder / uuid4().hex, entry
        self._files: list[BinaryIO] = []
        self._entries: list[tuple[int, ...]] = []
        self._offset = self._pending = 0
        self._flushed = time.monotonic()

    def append(self, data: bytes, **fields: int) -> None:
        """Keeps some data and its entry, to which offset and check are added."""
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
        """Brings what was written to the disk: data first, then the entries that make them count."""
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
            f"{path.parent}: the cache cannot be written: {error.strerror}; mend that and run vlm-distill cache again, "
            "which goes on with what is missing"
        ) from None


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
