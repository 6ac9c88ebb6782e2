"""Find the images in a value of a record: paths, URLs, base64, bytes, objects, or lists of these."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .conversation import ImageSource
from .errors import BadSample
from .images import named_image
from .keys import check_keys, is_empty, one_of

#: Keys of an object that may hold its image. If it has bytes as well as a path, the bytes count.
IMAGE_KEYS = ("path", "url", "file_name", "filename", "image", "image_url", "base64")
_NO_IMAGE = ("", "none", "null", "nan")


def images_of(value: Any, folder: Path, unread: Counter[str] | None = None) -> list[ImageSource]:
    """Return the images of one value: none, one, or one for each item of a list.

    Args:
        value: a path, ``file://`` or ``data:`` URL, base64, bytes, a Pillow image, an object with one of these under
            ``bytes`` or a key of :data:`IMAGE_KEYS`, or a list of such values.
        folder: the folder that relative paths start from.
        unread: counts the keys of objects that are not read.

    Raises:
        BadSample: the value is not a known kind of image.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        return [] if value.strip().lower() in _NO_IMAGE else [named_image(value, folder)]
    if isinstance(value, bytes | Image.Image):
        return [value]
    if isinstance(value, list | tuple):
        return [image for item in value for image in images_of(item, folder, unread)]
    if isinstance(value, Mapping):
        return _images_of_object(value, folder, Counter() if unread is None else unread)
    raise BadSample("unknown kind of image", f"a value of type {type(value).__name__}")


def _images_of_object(value: Mapping[str, Any], folder: Path, unread: Counter[str]) -> list[ImageSource]:
    keys = ("bytes", *IMAGE_KEYS)
    check_keys(value, keys, unread, "image.", has_image=True)
    content = value.get("bytes")
    if isinstance(content, bytes):
        return [content]
    named = one_of(value, IMAGE_KEYS) if is_empty(content) else content
    if named is None and not is_empty(value):
        raise BadSample("unknown kind of image", f"an object with the keys {', '.join(map(str, value))}")
    found = images_of(named, folder, unread)
    if not is_empty(content) and not all(isinstance(image, bytes) for image in found):
        raise BadSample("unknown kind of image", f"bytes: a value of type {type(content).__name__} that is not base64")
    return found
