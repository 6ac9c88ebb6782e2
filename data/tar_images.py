"""Labelled images in tar files, read in place: WebDataset shards, tars of class folders, and one tar per class."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from .errors import BadSample, UserError
from .labelled import IMAGE_SUFFIXES, LabelledImage, LabelledImages, is_image_name, labels_of
from .tars import Index, Member, Shards, Span, iterate_members, iterate_samples, open_shard, split_name

_INDEX_VERSION = 2
_PEEKED = 1000  # members that are searched to distinguish WebDataset from class folders
_LONGEST_LABEL = 1 << 20  # bytes
_LABEL_FIELDS = ("cls", "json", "txt")


class TarImages(LabelledImages):
    """Images in tar files, found by an index of byte offsets. Nothing is extracted.

    The index is built in one scan over the headers and cached (:meth:`data.tars.Shards.index`).

    Tars are read in WebDataset's layout (:func:`data.tars.iterate_samples`) if a sample holds an image and a label.
    Otherwise a member's class is its folder, or for members in no folder, the name of their tar.

    Args:
        shards: the tar files, in the order of samples.
        name: the name in reports.
        classes: names in the order of labels that are numbers; by default see :func:`data.labelled.labels_of`.
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
        self._shards = Shards(shards)
        question = ["labelled images", _INDEX_VERSION, image_key, label_key]
        index = self._shards.index(question, lambda: _index(self._shards, image_key, label_key))
        texts = [*json.loads(index["texts"].tobytes()), None]  # code -1 selects the last
        self._labels = labels_of([texts[code] for code in index["codes"].tolist()], classes)
        self.classes = self._labels.classes
        self._spans = index["places"]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> LabelledImage:
        index = range(len(self))[index]
        shard, start, length = self._spans[index].tolist()
        label = self._labels[index]
        if start < 0:
            raise BadSample("sample without image", f"in {self._shards.paths[shard].name}")
        return LabelledImage(self._shards.read(shard, start, length), label)


# The index.


def _index(shards: Shards, image_key: str | None, label_key: str | None) -> Index:
    """Return the index of the shards.

    ``places`` is int64 ``[samples, 3]``: shard, first byte (-1 for no image) and length of each image. ``codes`` is
    int32 ``[samples]``: the number of each label among ``texts`` (-1 for none), which is a JSON list as bytes.
    """
    webdataset = bool(image_key or label_key) or _has_labels(shards.paths[0])
    numbered = _count_up(shards.paths)
    spans, codes = array("q"), array("i")
    texts: dict[str, int] = {}
    for number, shard in enumerate(shards.paths):
        with open_shard(shard) as file:
            found = iterate_members(shard, file)
            if webdataset:
                labelled = _samples(file, found, image_key, label_key)
            else:
                labelled = _class_members(shard, file, found, None if numbered else shard.stem)
            for start, length, label in labelled:
                spans.extend((number, start, length))
                codes.append(-1 if label is None else texts.setdefault(label, len(texts)))
    index: Index = {
        "places": np.array(spans, np.int64).reshape(-1, 3),
        "codes": np.array(codes, np.int32),
        "texts": np.frombuffer(json.dumps(list(texts)).encode(), np.uint8),
    }
    if not (index["places"][:, 1] >= 0).any():
        looked = f"field {image_key!r}" if image_key else f"names ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        raise UserError(f"no images found in {shards}; looked for {looked}")
    if not texts:
        fields = f"{label_key!r}" if label_key else "cls, label in json, txt"
        looked = f"fields {fields}" if webdataset else f"fields {fields} beside the images, and for folders of classes"
        raise UserError(f"no labels found in {shards}; looked for {looked}")
    return index


def _count_up(shards: Sequence[Path]) -> bool:
    """Return whether the tars are merely numbered, so their names are not classes. Neither is that of a single tar."""
    counts = [re.search(r"[0-9]+$", shard.stem) for shard in shards]
    numbers = sorted(int(count[0]) for count in counts if count)
    return len(shards) == 1 or (len(numbers) == len(shards) and numbers[-1] - numbers[0] == len(numbers) - 1)


def _has_labels(shard: Path) -> bool:
    """Return whether some sample has an image and a label, as in WebDataset's layout."""
    with open_shard(shard) as file:
        seen: dict[str, set[bool]] = {}
        for name, _, _ in islice(iterate_members(shard, file), _PEEKED):
            key, field = split_name(name)
            if field in IMAGE_SUFFIXES or field in _LABEL_FIELDS:
                seen.setdefault(key, set()).add(field in IMAGE_SUFFIXES)
        return any(len(kinds) == 2 for kinds in seen.values())


def _samples(
    file: BinaryIO, found: Iterator[Member], image_key: str | None, label_key: str | None
) -> Iterator[tuple[int, int, str | None]]:
    """Yield the first byte and length of the image, and the label, of each sample in WebDataset's layout."""
    for _, fields in iterate_samples(found):
        yield from _sample(file, fields, image_key, label_key)


def _sample(
    file: BinaryIO, fields: dict[str, Span], image_key: str | None, label_key: str | None
) -> Iterator[tuple[int, int, str | None]]:
    """Yield a sample's image and label, unless it has neither."""
    wanted = {image_key.lower()} if image_key else IMAGE_SUFFIXES
    image = next((span for field, span in fields.items() if field in wanted), None)
    label = None
    for field in [label_key.lower(), "json"] if label_key else _LABEL_FIELDS:
        if label is None and field in fields:
            label = _label(file, *fields[field], key=(label_key or "label") if field == "json" else None)
    if image is not None or label is not None:  # otherwise it may be a note by whoever packed the tar
        yield *(image or (-1, 0)), label


def _label(file: BinaryIO, start: int, length: int, key: str | None) -> str | None:
    """Return the text of a member, or the value under a key of it."""
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
    shard: Path, file: BinaryIO, found: Iterator[Member], own: str | None
) -> Iterator[tuple[int, int, str | None]]:
    """Yield the first byte, length and class of each image in a tar of class folders, of one class, or of such tars.

    ``own`` is the class of members in no folder.
    """
    inner: list[Member] = []
    for name, start, length in found:
        path = PurePosixPath(name)
        if path.suffix == ".tar":
            inner.append((path.stem, start, length))
        elif is_image_name(name) and not path.name.startswith("."):
            yield start, length, path.parent.name or own
    for stem, begin, size in inner:
        yield from _class_members(shard, file, iterate_members(shard, file, begin, begin + size), stem)
