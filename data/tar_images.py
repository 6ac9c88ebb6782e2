"""Labelled images inside tar files, read where they lie: WebDataset shards, and tars of class folders or of classes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import BadSample, UserError
from .labelled import IMAGE_SUFFIXES, LabelledImage, LabelledImages, is_image_name, labels_of
from .sources import check_regular

_INDEX_VERSION = 1
_OPEN_SHARDS = 64  # a process may usually hold 1024 files open, and a rank has several workers
_PEEKED = 1000  # members that tell WebDataset from class folders
_LONGEST_LABEL = 1 << 20  # bytes of a label's member
_LABEL_FIELDS = ("cls", "json", "txt")


class TarImages(LabelledImages):
    """Images of tar files, found by an index of byte offsets. Nothing is extracted.

    The index is made by one walk over the headers and kept in the user's cache folder (``$XDG_CACHE_HOME``, else
    ``~/.cache``, there ``vlm-distill/tar-index``). It is made anew when the size or the time of a shard has changed.

    In WebDataset's layout, consecutive members with the same path up to the first dot of the file's name are a sample;
    what follows the dot, in lower case, is the member's field. A sample also ends where a field comes again. Otherwise
    a member's class is the folder it is in; of members in no folder, the name of their tar.

    Args:
        shards: the tar files, in the order of rows.
        name: what reports call the source.
        classes: names in the order of labels that are numbers; by default as :func:`data.labelled.labels_of` says.
        image_key: the field that holds the image; by default the first one with the name of an image format.
        label_key: the field that holds the label, or the key of it in the field ``json``; by default ``cls``, then
            ``label`` in ``json``, then ``txt``.

    Raises:
        UserError: a shard is missing, truncated or compressed, or there are no images or labels in the shards.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        name: str,
        *,
        classes: Sequence[str] | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
    ) -> None:
        self.name = name
        self._shards = [shard.absolute() for shard in shards]
        self._stats = _stats(self._shards)
        index = _cached_index(self._shards, self._stats, image_key, label_key)
        texts = [*index.texts, None]  # the code -1 is the last
        self._labels = labels_of([texts[code] for code in index.codes.tolist()], classes)
        self.classes = self._labels.classes
        self._places = index.places
        self._files: OrderedDict[int, _File] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> LabelledImage:
        row = range(len(self))[row]
        shard, start, length = self._places[row].tolist()
        label = self._labels[row]
        if start < 0:
            raise BadSample("sample without image", f"in {self._shards[shard].name}")
        return LabelledImage(self._read(shard, start, length), label)

    def _read(self, shard: int, start: int, length: int) -> bytes:
        file = self._files.pop(shard, None) or _File(self._shards[shard], self._stats[shard].tolist())
        self._files[shard] = file  # at the end: the one used last
        while len(self._files) > _OPEN_SHARDS:
            self._files.popitem(last=False)
        # A read at a place of its own: a file inherited by workers has one position for all of them.
        data = os.pread(file.number, length, start)
        if len(data) < length:
            raise UserError(f"{self._shards[shard]} ends early; it has changed since it was indexed: fetch it again")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}


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


# The index.


@dataclass
class _Index:
    """Places of the images: int64 [rows, 3] of shard, first byte (-1: no image) and length; labels as texts."""

    places: NDArray[np.int64]
    codes: NDArray[np.int32]  # [rows], places in `texts`; -1: no label
    texts: list[str]


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


def _cached_index(
    shards: Sequence[Path], stats: NDArray[np.int64], image_key: str | None, label_key: str | None
) -> _Index:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = json.dumps([_INDEX_VERSION, [os.fspath(shard) for shard in shards], image_key, label_key])
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    path = Path(base) / "vlm-distill" / "tar-index" / f"{digest[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            if np.array_equal(saved["stats"], stats):
                return _Index(saved["places"], saved["codes"], json.loads(saved["texts"].tobytes()))
    except Exception:  # not there, or cut off: whatever is wrong with it, it can be made again
        pass
    index = _index(shards, image_key, label_key)
    _save(path, stats, index)
    return index


def _save(path: Path, stats: NDArray[np.int64], index: _Index) -> None:
    texts = np.frombuffer(json.dumps(index.texts).encode(), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several ranks may write it at once: each its own file, put in place whole.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, stats=stats, places=index.places, codes=index.codes, texts=texts)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:
        pass  # a home that cannot be written to: the index lasts as long as the process


def _index(shards: Sequence[Path], image_key: str | None, label_key: str | None) -> _Index:
    webdataset = bool(image_key or label_key) or _has_labels(shards[0])
    numbered = _count_up(shards)
    places, codes = array("q"), array("i")
    texts: dict[str, int] = {}
    for number, shard in enumerate(shards):
        with _opened(shard) as file:
            members = _members(shard, file)
            if webdataset:
                rows = _samples(file, members, image_key, label_key)
            else:
                rows = _class_members(shard, file, members, None if numbered else shard.stem)
            for start, length, label in rows:
                places.extend((number, start, length))
                codes.append(-1 if label is None else texts.setdefault(label, len(texts)))
    index = _Index(np.array(places, np.int64).reshape(-1, 3), np.array(codes, np.int32), list(texts))
    _check(shards, index, webdataset, image_key, label_key)
    return index


def _check(
    shards: Sequence[Path], index: _Index, webdataset: bool, image_key: str | None, label_key: str | None
) -> None:
    given = f"{shards[0]}" if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
    if not (index.places[:, 1] >= 0).any():
        looked = f"field {image_key!r}" if image_key else f"names ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        raise UserError(f"no images found in {given}; looked for {looked}")
    if not (index.codes >= 0).any():
        fields = f"{label_key!r}" if label_key else "cls, label in json, txt"
        looked = f"fields {fields}" if webdataset else f"fields {fields} beside the images, and for folders of classes"
        raise UserError(f"no labels found in {given}; looked for {looked}")


def _count_up(shards: Sequence[Path]) -> bool:
    """Whether the names of tars merely number them, and so are no classes. One tar alone is no class either."""
    counts = [re.search(r"[0-9]+$", shard.stem) for shard in shards]
    numbers = sorted(int(count[0]) for count in counts if count)
    return len(shards) == 1 or (len(numbers) == len(shards) and numbers[-1] - numbers[0] == len(numbers) - 1)


def _opened(shard: Path) -> BinaryIO:
    try:
        return shard.open("rb")
    except OSError as error:
        raise UserError(f"tar file {shard} cannot be read: {error.strerror}; check the path") from None


def _members(shard: Path, file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and length of each file in the tar that begins at ``start`` of an open file."""
    size = os.fstat(file.fileno()).st_size
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else the million it has seen stay in memory
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is stored with holes, which is not supported")
                if member.isreg():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} is cut off")
                    yield member.name.removeprefix("./"), member.offset_data, member.size
                elif member.islnk() and is_image_name(member.name):
                    raise tarfile.ReadError(f"{member.name} is a link to another member, which is not supported")
            # The library takes a broken header for the end.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) or (end is not None and tar.offset > end):
                raise tarfile.ReadError(f"no mark of its end at byte {tar.offset}")
    except UserError:
        raise
    except Exception as error:  # of a broken header the library makes almost anything, a request for exabytes too
        inner = f" at byte {start}" if start else ""
        raise UserError(
            f"{shard}{inner} is truncated, broken or compressed ({error}); fetch it again, or unpack .gz first"
        ) from None


def _has_labels(shard: Path) -> bool:
    """Whether an image and a label stand side by side, as WebDataset lays them out."""
    with _opened(shard) as file:
        seen: dict[str, set[bool]] = {}
        for name, _, _ in islice(_members(shard, file), _PEEKED):
            key, field = _split(name)
            if field in IMAGE_SUFFIXES or field in _LABEL_FIELDS:
                seen.setdefault(key, set()).add(field in IMAGE_SUFFIXES)
        return any(len(kinds) == 2 for kinds in seen.values())


def _split(name: str) -> tuple[str, str]:
    """Key and field of a member."""
    folder, slash, file = name.rpartition("/")
    stem, _, field = file.partition(".")
    return f"{folder}{slash}{stem}", field.lower()


def _samples(
    file: BinaryIO, members: Iterator[tuple[str, int, int]], image_key: str | None, label_key: str | None
) -> Iterator[tuple[int, int, str | None]]:
    """First byte and length of the image, and the label, of each sample in WebDataset's layout."""
    current = ""
    fields: dict[str, tuple[int, int]] = {}
    for name, start, length in members:
        key, field = _split(name)
        if key != current or field in fields:
            yield from _sample(file, fields, image_key, label_key)
            current, fields = key, {}
        if field:
            fields[field] = (start, length)
    yield from _sample(file, fields, image_key, label_key)


def _sample(
    file: BinaryIO, fields: dict[str, tuple[int, int]], image_key: str | None, label_key: str | None
) -> Iterator[tuple[int, int, str | None]]:
    image = next((fields[f] for f in fields if (f == image_key.lower() if image_key else f in IMAGE_SUFFIXES)), None)
    label = None
    for field in [label_key.lower(), "json"] if label_key else _LABEL_FIELDS:
        if label is None and field in fields:
            label = _label(file, *fields[field], key=(label_key or "label") if field == "json" else None)
    if image is not None or label is not None:  # else a note of the packer, say
        yield *(image or (-1, 0)), label


def _label(file: BinaryIO, start: int, length: int, key: str | None) -> str | None:
    """What a member says, or what stands under a key of it."""
    file.seek(start)
    text = file.read(min(length, _LONGEST_LABEL)).decode(errors="replace")
    if key is None:
        return text.strip() or None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    value = content.get(key) if isinstance(content, dict) else content
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def _class_members(
    shard: Path, file: BinaryIO, members: Iterator[tuple[str, int, int]], own: str | None
) -> Iterator[tuple[int, int, str | None]]:
    """First byte, length and class of each image in a tar of class folders, of one class (``own``), or of such tars."""
    inner: list[tuple[str, int, int]] = []
    for name, start, length in members:
        path = PurePosixPath(name)
        if path.suffix == ".tar":
            inner.append((path.stem, start, length))
        elif is_image_name(name) and not path.name.startswith("."):
            yield start, length, path.parent.name or own
    for stem, begin, size in inner:
        yield from _class_members(shard, file, _members(shard, file, begin, begin + size), stem)
