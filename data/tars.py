"""Read tar files in place: find the shards, index their members once, then read any member directly."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import BadSample, UserError
from .labelled import is_image_name
from .paths import SPLITS, check_regular, choose_split

_OPEN_SHARDS = 64  # the usual limit is 1024 open files per process, and a rank has several workers
#: The largest member that is read. Anything larger is damaged and would fill the memory.
MAX_MEMBER = 512 << 20
_MAX_HEADER = 16 << 20
_SHARD_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")

#: First byte and length of a member.
Span = tuple[int, int]
#: Name, first byte and length of a member.
Member = tuple[str, int, int]
Index = dict[str, NDArray[Any]]


class Shards:
    """Tar files, read in place without extracting anything. Worker processes can inherit or unpickle it.

    Args:
        paths: the files, in the order of their samples.

    Raises:
        UserError: one of them does not exist.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [path.absolute() for path in paths]
        self._stats = _stats(self.paths)
        self._files: OrderedDict[int, _File] = OrderedDict()

    def read(self, shard: int, start: int, length: int) -> bytes:
        """Read ``length`` bytes of a shard.

        Raises:
            BadSample: ``length`` exceeds :data:`MAX_MEMBER`.
            UserError: the shard has changed.
        """
        if length > MAX_MEMBER:
            raise BadSample("tar member is too large", f"{length:,} bytes, limit {MAX_MEMBER:,}")
        file = self._files.pop(shard, None) or _File(self.paths[shard], self._stats[shard].tolist())
        self._files[shard] = file  # moved to the end: most recently used
        while len(self._files) > _OPEN_SHARDS:
            self._files.popitem(last=False)
        # Not seek and read: workers that inherited the file share its position.
        data = os.pread(file.number, length, start)
        if len(data) < length:
            raise UserError(f"{self.paths[shard]} ends early; it has changed since it was indexed: fetch it again")
        return data

    def index(self, question: Sequence[Any], make: Callable[[], Index]) -> Index:
        """Return the index that ``make`` builds from the shards, cached between runs.

        The cache is ``vlm-distill/tar-index`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``. An index is rebuilt when
        the size or modification time of a shard has changed.

        Args:
            question: everything except the shards that determines the index, as JSON values.
            make: scans the shards and returns arrays by name.
        """
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        key = json.dumps([*question, [os.fspath(path) for path in self.paths]])
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        path = Path(base) / "vlm-distill" / "tar-index" / f"{digest[:32]}.npz"
        try:
            with np.load(path, allow_pickle=False) as saved:
                if np.array_equal(saved["stats"], self._stats):
                    return {name: saved[name] for name in saved.files}
        except Exception:  # missing or damaged: it can be rebuilt
            pass
        index = make()
        _save(path, index | {"stats": self._stats})
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __str__(self) -> str:
        return f"{self.paths[0]}" if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"


class _File:
    """An open file that is closed with the last reference to it."""

    def __init__(self, path: Path, expected: Sequence[int]) -> None:
        self.number = -1
        try:
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self.number)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if [found.st_size, found.st_mtime_ns] != list(expected):
            raise UserError(f"{path} has changed since it was indexed; start again")

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _stats(shards: Sequence[Path]) -> NDArray[np.int64]:
    """int64 [shards, 2]: size and time of change in nanoseconds."""
    stats = []
    for shard in shards:
        try:
            stat = shard.stat()
        except OSError as error:
            raise UserError(f"tar file {shard} cannot be read: {error.strerror}; check the path") from None
        check_regular(shard)
        stats.append((stat.st_size, stat.st_mtime_ns))
    return np.array(stats, dtype=np.int64).reshape(-1, 2)


def _save(path: Path, arrays: Index) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several ranks may write it at once: each writes its own file and renames it.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:
        pass  # the folder is not writable: the index lasts as long as the process


# Members.


def open_shard(shard: Path) -> BinaryIO:
    """Open a tar file. Raise ``UserError`` if it cannot be read."""
    try:
        return shard.open("rb")
    except OSError as error:
        raise UserError(f"tar file {shard} cannot be read: {error.strerror}; check the path") from None


class _Headers:
    """A file that limits what ``tarfile`` reads of a header, which could fill the memory or never end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ends = 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        content = self._file.read(size)
        self._ends = 0 if content else self._ends + 1
        if self._ends > 3:
            raise tarfile.ReadError("a header goes on after the end")
        return content


def iterate_members(shard: Path, file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yield the name, first byte and length of each file in the tar that begins at ``start`` of an open file."""
    size = os.fstat(file.fileno()).st_size
    file.seek(start)
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members.clear()  # or a million of them would stay in memory
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size} bytes")
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is stored with holes, which is not supported")
                if member.isreg():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} is cut off")
                    yield member.name.removeprefix("./"), member.offset_data, member.size
                elif member.islnk() and is_image_name(member.name):
                    raise tarfile.ReadError(f"{member.name} is a link to another member, which is not supported")
            # The library mistakes a broken header for the end.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) or (end is not None and tar.offset > end):
                raise tarfile.ReadError(f"no mark of its end at byte {tar.offset}")
    except UserError:
        raise
    except Exception as error:  # a broken header may make the library raise anything, even ask for exabytes
        inner = f" at byte {start}" if start else ""
        raise UserError(
            f"{shard}{inner} is truncated, broken or compressed ({error}); fetch it again, or unpack .gz first"
        ) from None


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into its sample's key and its field."""
    folder, slash, file = name.rpartition("/")
    stem, _, field = file.partition(".")
    return f"{folder}{slash}{stem}", field.lower()


def iterate_samples(found: Iterable[Member]) -> Iterator[tuple[str, dict[str, Span]]]:
    """Yield WebDataset's samples: the key, and each field's span.

    Consecutive members with the same path up to the first dot of the file name are one sample; what follows the dot, in
    lower case, is the member's field. A repeated field also starts a new sample.
    """
    current = ""
    fields: dict[str, Span] = {}
    for name, start, length in found:
        key, field = split_name(name)
        if key != current or field in fields:
            if fields:
                yield current, fields
            current, fields = key, {}
        if field:
            fields[field] = (start, length)
    if fields:
        yield current, fields


# Shards.


def is_shard_pattern(given: str) -> bool:
    """Return whether a path is a pattern with ``*``, ``?``, ``[…]`` or ``{000..127}``."""
    return glob.has_magic(given) or _SHARD_RANGE.search(given) is not None


def find_shards(path: Path, given: str, split: str | None) -> list[Path]:
    """Return the requested tar files, sorted by name.

    Args:
        path: a tar file, a folder of them, or a pattern.
        given: the path as the user wrote it, for messages.
        split: the split, if names of folders or files contain one.

    Raises:
        UserError: there are no files, or no such split.
    """
    if path.is_dir():
        return _shards_in(path, given, split)
    if path.exists():
        return _no_split([path], given, split)
    if _SHARD_RANGE.search(given):
        return _no_split([Path(one) for one in _expanded(given)], given, split)
    shards = sorted(map(Path, glob.glob(given)))
    if not shards:
        raise UserError(f"no files match {given}; check the path (relative ones start at {Path.cwd()})")
    return _no_split(shards, given, split)


def _shards_in(folder: Path, given: str, split: str | None) -> list[Path]:
    """Return the tar files in a folder, of one split if there are several."""
    folders = sorted(one.name for one in folder.iterdir() if one.name in (*SPLITS, split) and one.is_dir())
    if folders and not any(folder.glob("*.tar")):
        folder = folder / choose_split(given, split, folders)
        split = None
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder} holds no .tar files; name them, or unpack compressed ones")

    # Do the files' names say which split they are?
    by_split: dict[str, list[Path]] = {}
    for shard in shards:
        words = re.split(r"[-_.]", shard.stem)
        named = next((word for word in words if word in SPLITS or word == split), "")
        by_split.setdefault(named, []).append(shard)
    splits = [one for one in by_split if one]
    if len(splits) > 1 or (splits and (split or "" not in by_split)):
        return by_split[choose_split(given, split, splits)]
    return _no_split(shards, given, split)  # a tar may be named by its class, and a class may be called train


def _no_split(shards: list[Path], given: str, split: str | None) -> list[Path]:
    if split:
        raise UserError(f"{given} has no split {split!r}; name the shards of the split by a pattern")
    return shards


def _expanded(pattern: str) -> list[str]:
    """Expand ``a{00..02}`` to ``a00``, ``a01``, ``a02``, with as many digits as the first number."""
    match = _SHARD_RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if last < first or last - first > 1_000_000:
        raise UserError(f"{pattern}: the range {match[0]} must go up, by a million at most")
    head, digits = pattern[: match.start()], len(match[1])
    tails = _expanded(pattern[match.end() :])
    found = []
    for number in range(first, last + 1):
        found += [f"{head}{number:0{digits}}{tail}" for tail in tails]
    return found
