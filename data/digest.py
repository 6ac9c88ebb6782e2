"""Fingerprint a source cheaply, by the number of its samples and the content of some of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .conversation import Conversation, Document, ImageSource, VideoFile
from .errors import BadSample
from .labelled import LabelledImage

#: The most samples that are read: the first, the last and others evenly spaced.
LOOKED_AT = 128
# Bytes of an image's file that are read.
_HEAD = 2**16
_NO_FILE = b"no file"
# The most missing images that are kept.
_NAMED = 8


class Digestible(Protocol):
    """What a digest needs of a source: of conversations, plain text or labelled images."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Conversation | Document | LabelledImage: ...


@dataclass(frozen=True)
class SourceDigest:
    """A source's data in short, as it is kept in checkpoints.

    Attributes:
        name: of the source.
        rows: number of samples.
        content: digest of some samples as they are read, and of the sizes and first bytes of their images.
        classes: digest of the names of its classes; empty if it has none.
        missing: the first images of these samples that were not found.
    """

    name: str
    rows: int
    content: str
    classes: str = ""
    missing: tuple[str, ...] = ()


def digest_source(source: Digestible) -> SourceDigest:
    """Return the digest of a source.

    It changes with the samples, their order and their number, and with edits of those that are read: all of up to 128.
    An edit of a sample that is not read goes unnoticed.
    """
    digest = hashlib.blake2b(digest_size=8)
    read = np.unique(np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(np.int64))
    missing: list[str] = []
    for index in read.tolist():
        try:
            sample = source[index]
            parts = _parts(sample)
            missing += _missing(sample)
        except BadSample as bad:
            parts = [bad.reason.encode()]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
    classes = getattr(source, "classes", None)
    names = "" if classes is None else hashlib.blake2b(json.dumps(classes).encode(), digest_size=8).hexdigest()
    return SourceDigest(source.name, len(source), digest.hexdigest(), names, tuple(missing[:_NAMED]))


def _missing(sample: Conversation | Document | LabelledImage) -> list[str]:
    """Return the paths of a sample's images that are not found."""
    if isinstance(sample, Document):
        return []
    images = [sample.image] if isinstance(sample, LabelledImage) else sample.images
    images = [image.source if isinstance(image, VideoFile) else image for image in images]
    return [str(image) for image in images if isinstance(image, str | Path) and _image(image) == _NO_FILE]


def _parts(sample: Conversation | Document | LabelledImage) -> Iterable[bytes]:
    if isinstance(sample, LabelledImage):
        return [str(sample.label).encode(), _image(sample.image)]
    if isinstance(sample, Document):
        return [sample.text.encode(errors="surrogatepass"), str(sample.last).encode()]
    content = json.dumps([sample.messages, sample.tools], sort_keys=True, default=str)
    return [content.encode(), *map(_image, sample.images)]


def _image(image: ImageSource) -> bytes:
    """Return the size and the first bytes of an image's file, or the image itself if it is in memory."""
    if isinstance(image, VideoFile):
        image = image.source
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        return image.tobytes()
    try:
        path = Path(image)
        if path.is_file():
            with path.open("rb") as file:
                return f"{path.stat().st_size} ".encode() + file.read(_HEAD)
    except (OSError, ValueError):
        pass
    return _NO_FILE


def differences(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe how a run's sources have changed, given their digests (as JSON objects) before and now, in order."""
    if len(before) != len(now):
        return [f"{len(before)} sources → {len(now)}"]
    found = []
    for old, new in zip(before, now, strict=True):
        if old.get("rows") != new["rows"]:
            found.append(f"{new['name']}: {old.get('rows')} rows → {new['rows']}")
        elif any(old.get(key) != new[key] for key in ("content", "classes")):
            before_missing, missing = old.get("missing", ()), new["missing"]
            what = f"other content in its {new['rows']} rows"
            if len(missing) > len(before_missing):
                gone = [path for path in missing if path not in before_missing]
                what = f"image not found: {gone[0]}"
            found.append(f"{new['name']}: {what}")
    return found
