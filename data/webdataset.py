"""WebDataset shards as a source of conversations: records and images in tar files, read in any order."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadSample, UserError
from .image_values import IMAGE_KEYS, images_of
from .keys import is_empty, one_of
from .labelled import is_image_name
from .messages import IMAGE_PARTS, VIDEO_PARTS
from .sources import Source
from .tars import Index, Shards, iterate_members, iterate_samples, open_shard, split_name

_INDEX_VERSION = 1
_RECORD, _CAPTION, _IMAGE = range(3)


class WebDatasetSource(Source):
    """Samples of tar files: members with the same name up to the first dot; the rest of the name is the field.

    ``json`` holds a record in any layout of :mod:`data.layouts`; without it, ``txt`` holds a caption, which becomes the
    answer to the image alone. Images are the members named like image files (``jpg``, ``0.jpg``, ``left.png``), in the
    order of the tar, or in the order in which the record names them. Other names of images in a record are from before
    they were packed: files beside the tar are never read. Files of videos are not read from a tar.

    Shards are not assigned to ranks or workers. An index says where each sample is, so any rank can read any sample,
    and the order does not depend on the number of ranks.

    Args:
        shards: the tar files, in the order of samples.

    Raises:
        UserError: a shard is missing, truncated or compressed, or has neither records nor captions.
    """

    def __init__(self, shards: Sequence[Path], name: str, **shared: Any) -> None:
        super().__init__(name, Path(), **shared)
        self.chosen |= {"images"}  # the members are the images, whatever the record says
        self._shards = Shards(shards)
        index = self._shards.index(["conversations", _INDEX_VERSION], lambda: _index(self._shards))
        #: int64 ``[fields, 5]``: shard, first byte, length, kind, and where in ``_names`` the member's name ends.
        self._fields: NDArray[np.int64] = index["fields"]
        self._names: bytes = index["names"].tobytes()
        #: int64 ``[samples + 1]``: the first field of each.
        first: NDArray[np.int64] = index["first"]
        samples = range(len(first) - 1)[self.rows]
        self._first = first[samples.start : samples.stop + 1]

    def __len__(self) -> int:
        return len(self._first) - 1

    def _members(self, index: int) -> list[tuple[int, int, int, int, str]]:
        """Return the shard, first byte, length, kind and name of each of a sample's members."""
        start, stop = self._first[index : index + 2].tolist()
        begin = int(self._fields[start - 1, 4]) if start else 0
        found = []
        for shard, first, length, kind, end in self._fields[start:stop].tolist():
            found.append((shard, first, length, kind, self._names[begin:end].decode(errors="replace")))
            begin = end
        return found

    def read(self, index: int) -> Any:
        """Return the record without images, or a record made of the caption."""
        members = [member for member in self._members(index) if member[3] != _IMAGE]
        shard, start, length, kind, name = min(members, key=lambda member: member[3])
        try:
            text = self._shards.read(shard, start, length).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample("invalid UTF-8", f"{name}: {error}") from None
        if kind == _CAPTION:
            return {"caption": text.strip()}
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample("invalid JSON", str(error)) from None

    def record(self, index: int) -> Any:
        record = super().record(index)
        if not isinstance(record, dict):
            return record
        images = {
            name: self._shards.read(shard, start, length)
            for shard, start, length, kind, name in self._members(index)
            if kind == _IMAGE
        }
        return _with_images(record, images)

    def size(self, index: int) -> int:
        return int(self.sizes()[index])

    def sizes(self) -> NDArray[np.int64]:
        texts = np.where(self._fields[:, 3] == _IMAGE, 0, self._fields[:, 2])
        total = np.concatenate(([0], np.cumsum(texts)))
        return total[self._first[1:]] - total[self._first[:-1]]


def _with_images(record: dict[str, Any], images: dict[str, bytes]) -> dict[str, Any]:
    """Return the record with the members as its images, whatever it calls them. See :class:`WebDatasetSource`."""
    if not (is_empty(record.get("videos")) and is_empty(record.get("video"))):
        raise _video_in_tar()
    found = _named(record.pop("images", None)) + _named(record.pop("image", None))
    videos = []
    for part in _seen_parts(record):
        if part["type"] in VIDEO_PARTS:
            own = _named(part.pop("frames", None))
            if isinstance(part.get("video"), list):
                own += _named(part.pop("video"))
            if not own:
                raise _video_in_tar()
            videos.append((part, range(len(found), len(found) + len(own))))
        else:
            own = _named([part.pop(key, None) for key in ("bytes", *IMAGE_KEYS)])
        found += own
    given = _in_order(found, images)
    frames: set[int] = set()
    for part, numbers in videos:
        part["frames"] = [given[number] for number in numbers]
        frames.update(numbers)
    return record | {"images": [image for number, image in enumerate(given) if number not in frames]}


def _video_in_tar() -> BadSample:
    return BadSample("video in a tar", "pack its frames as images, and list them under frames of a video part")


def _in_order(found: list[str | bytes], images: dict[str, bytes]) -> list[bytes]:
    """Return the images that a record names or holds, in its order; if it names none, those of the tar in its order."""
    names = [name for name in found if isinstance(name, str)]
    if found and len(names) != len(images):
        raise BadSample("image count mismatch", f"the record names {len(names)}, the tar has {len(images)} for it")
    fields = {name.partition(".")[2]: name for name in images}
    members = [_member(name, images, fields) for name in names]
    named = {member for member in members if member is not None}
    ordered = iter([images[member] for member in members if member] if len(named) == len(images) else images.values())
    return [one if isinstance(one, bytes) else next(ordered) for one in found] or list(images.values())


def _member(name: str, images: Mapping[str, bytes], fields: Mapping[str, str]) -> str | None:
    """Return the member that a record names, by its field or by its file name in any folder; ``None`` for none."""
    whole = ".".join(split_name(name.rpartition("/")[2]))
    return whole if whole in images else fields.get(name.lower())


def _named(value: Any) -> list[str | bytes]:
    """Return the images of a value: names of members, or bytes that the record itself holds."""
    if isinstance(value, list):
        return [one for item in value for one in _named(item)]
    if isinstance(value, dict):
        return _named(one_of(value, ("bytes", *IMAGE_KEYS)))
    return [one for one in images_of(value, Path()) if isinstance(one, str | bytes)]


def _seen_parts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the image and video parts of messages, at any depth."""
    if isinstance(value, dict):
        if value.get("type") in (*IMAGE_PARTS, *VIDEO_PARTS):
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _seen_parts(one)


def _index(shards: Shards) -> Index:
    """Return the index of all samples' members, as :class:`WebDatasetSource` describes it."""
    fields, first, names = array("q"), array("q", [0]), bytearray()
    for number, shard in enumerate(shards.paths):
        with open_shard(shard) as file:
            for key, spans in iterate_samples(iterate_members(shard, file)):
                kinds = {field: kind for field in spans if (kind := _kind(field)) is not None}
                if not kinds or all(kind == _IMAGE for kind in kinds.values()):
                    continue
                for field, kind in kinds.items():
                    names += f"{key.rpartition('/')[2]}.{field}".encode(errors="surrogateescape")
                    fields.extend((number, *spans[field], kind, len(names)))
                first.append(len(fields) // 5)
    if len(first) == 1:
        raise UserError(f"no samples found in {shards}: none of its members is a record (.json) or a caption (.txt)")
    return {
        "fields": np.array(fields, np.int64).reshape(-1, 5),
        "first": np.array(first, np.int64),
        "names": np.frombuffer(bytes(names), np.uint8),
    }


def _kind(field: str) -> int | None:
    if field == "json":
        return _RECORD
    if field == "txt":
        return _CAPTION
    return _IMAGE if is_image_name(field) else None
