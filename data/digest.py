"""What the rows of a source are, told apart from others cheaply: by their number and the content of some of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .conversation import Conversation, Document, ImageSource
from .errors import BadSample
from .labelled import LabelledImage

#: Rows that are looked at, the first, the last and others evenly spaced; and bytes of an image's file.
LOOKED_AT = 128
_HEAD = 2**16
_NO_FILE = b"no file"
_NAMED = 8  # missing images that are kept


class Rows(Protocol):
    """What a source needs to be told apart: image-text samples, text or labelled images."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Conversation | Document | LabelledImage: ...


@dataclass(frozen=True)
class RowsDigest:
    """A source's data in short.

    Attributes:
        name: of the source.
        rows: how many it has.
        content: digest of some rows as they are read, and of the beginnings and sizes of their images.
        classes: digest of the names of its classes; empty where it has none.
        missing: the first images of these rows that were not found.
    """

    name: str
    rows: int
    content: str
    classes: str = ""
    missing: tuple[str, ...] = ()


def digest_rows(source: Rows) -> RowsDigest:
    """Return the digest of a source.

    Sees other rows, another order and another number of them, and edits of the rows looked at: all of them where there
    are no more than 128. An edit of a row between two that are looked at goes unseen.
    """
    digest = hashlib.blake2b(digest_size=8)
    missing: list[str] = []
    for row in np.unique(np.linspace(0, len(source) - 1, min(len(source), LOOKED_AT)).astype(np.int64)).tolist():
        try:
            sample = source[row]
            parts = _parts(sample)
            missing += _missing(sample)
        except BadSample as bad:
            parts = [bad.reason.encode()]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
    classes = getattr(source, "classes", None)
    names = "" if classes is None else hashlib.blake2b(json.dumps(classes).encode(), digest_size=8).hexdigest()
    return RowsDigest(source.name, len(source), digest.hexdigest(), names, tuple(missing[:_NAMED]))


def _missing(sample: Conversation | Document | LabelledImage) -> list[str]:
    """Return the paths of a sample's images that are not found."""
    if isinstance(sample, Document):
        return []
    images = [sample.image] if isinstance(sample, LabelledImage) else sample.images
    return [str(image) for image in images if isinstance(image, str | Path) and _image(image) == _NO_FILE]


def _parts(sample: Conversation | Document | LabelledImage) -> Iterable[bytes]:
    if isinstance(sample, LabelledImage):
        return [str(sample.label).encode(), _image(sample.image)]
    if isinstance(sample, Document):
        return [sample.text.encode(errors="surrogatepass"), str(sample.last).encode()]
    told = json.dumps([sample.messages, sample.tools], sort_keys=True, default=str)
    return [told.encode(), *map(_image, sample.images)]


def _image(image: ImageSource) -> bytes:
    """The size and the beginning of an image's file, or what there is in place of one."""
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
    """Return in words what differs between the sources of two moments, each a digest as JSON keeps it, in order."""
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
