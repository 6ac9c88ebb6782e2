"""Decode images safely: a path, the bytes of a file or a Pillow image becomes upright 8-bit RGB, or a ``BadSample``."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image, UnidentifiedImageError

from .conversation import ImageSource, VideoFile
from .errors import BadSample

MAX_PIXELS = 89_478_485
#: The largest ratio of the sides. Models scale an image by its shorter side: one line of 65,535 pixels would be scaled
#: to billions of pixels.
MAX_RATIO = 200

# Formats that are decoded in this process from their own bytes. Excluded are formats that start other programs (EPS) or
# hold images of another size than their header's (ICO, ICNS), which would pass the check of the size.
Image.init()
FORMATS = tuple(f for f in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if f in Image.OPEN)

# Pillow's own guard against decompression bombs is global to the process and partly a mere warning. It is switched off:
# `load_image` checks every image against the caller's limit before decoding it.
Image.MAX_IMAGE_PIXELS = None

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
#: The formats' magic bytes.
_MAGIC = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|P[1-6]\s"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftypavi[fs]",
    re.DOTALL,
)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{16,}={0,2}\s*")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_url(text: str) -> bool:
    """Return whether a string is a URL (``http://…``, ``file://…``, ``data:…``) rather than a path."""
    return _URL.match(text) is not None


def named_image(text: str, folder: Path) -> ImageSource:
    """Return the image that a text names: a path below ``folder``, a ``file://`` URL, a ``data:`` URL, or base64.

    Other URLs are returned as they are; :func:`load_image` refuses them.

    Raises:
        BadSample: a ``data:`` URL or base64 is broken, or a ``file://`` URL names another computer.
    """
    if text[:5].lower() == "data:":
        return _bytes_of_data_url(text)
    if text[:7].lower() == "file://":
        return _path_of_file_url(text)
    if is_url(text):
        return text
    # A text that begins like an image in base64 is not a file name.
    start = "".join(text[:64].split())
    start = start[: len(start) // 4 * 4]
    if _BASE64.fullmatch(text[:400]) and _MAGIC.match(base64.b64decode(start)):
        return _bytes_of_base64(text)
    return str(folder / text)


def _bytes_of_data_url(url: str) -> bytes:
    head, comma, content = url[5:].partition(",")
    if not comma:
        raise BadSample("image is not base64", f"{url[:40]}… has no comma")
    return _bytes_of_base64(content) if head.lower().endswith(";base64") else unquote_to_bytes(content)


def _bytes_of_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("image is not base64", str(error)) from None


def _path_of_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise BadSample("image is a URL, only local files are read", f"{url[:200]}; write file:///… with three slashes")
    return unquote_to_bytes(parts.path).decode(errors="surrogateescape")


def load_image(
    source: ImageSource,
    *,
    roots: Sequence[Path] = (),
    max_pixels: int = MAX_PIXELS,
    alpha: Literal["white", "drop"] = "white",
) -> Image.Image:
    """Load an image as a person sees it: upright (EXIF), RGB, transparent parts on white, the first of several frames.

    Args:
        source: the path of a local file, the bytes of an image file, or a Pillow image (which is not modified).
        roots: if given, only paths inside these folders are read, after resolving symbolic links.
        max_pixels: the largest width × height, checked before decoding.
        alpha: put transparent parts on ``white``, or ``drop`` transparency, which reveals hidden colours. VLMEvalKit
            and lmms-eval drop it, so their scores are for such images.

    Returns:
        An 8-bit image of mode ``RGB``. 16-bit grey values ``v`` become ``v / 257``, rounded.

    Raises:
        BadSample: the file is missing, empty, outside the roots, not an image, broken, too large, has values of unknown
            range (floating point, 32-bit integers), or one side is over 200 times the other.
    """
    if isinstance(source, VideoFile):
        raise BadSample("video file", "only an image is read here")
    if isinstance(source, Image.Image):
        return _decoded(source, max_pixels, f"a {source.mode} image", alpha)
    if isinstance(source, bytes):
        if not source:
            raise BadSample("image file is empty", "0 bytes")
        file: io.BytesIO | Path = io.BytesIO(source)
        name = f"{len(source)} bytes"
    else:
        file = local_file(source, roots)
        name = source
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSample("not an image", f"{name} (formats read: {', '.join(FORMATS)})") from None
    except Exception as error:  # plugins may raise anything on a broken header
        raise BadSample("image is broken", f"{name}: {error}") from None
    with image:
        return _decoded(image, max_pixels, name, alpha)


def local_file(source: str, roots: Sequence[Path], what: str = "image") -> Path:
    """Return the path of a local file inside the roots. Raise ``BadSample`` if it is another, missing or empty."""
    if is_url(source):
        raise BadSample(f"{what} is a URL, only local files are read", source[:200])
    try:
        path = Path(source).resolve()
        if roots and not any(path.is_relative_to(Path(root).resolve()) for root in roots):
            raise BadSample(f"{what} outside the roots", source)
        # A pipe or a device would block or never end.
        if not path.is_file():
            raise BadSample(f"{what} not found", source)
        if path.stat().st_size == 0:
            raise BadSample(f"{what} file is empty", source)
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a zero byte in the name, a loop of links
        raise BadSample(f"{what} not found", f"{source[:200]!r}: {error}") from None
    return path


def _decoded(image: Image.Image, max_pixels: int, name: str, alpha: str) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample("image is too large", f"{name}: {width} x {height} pixels, limit {max_pixels}")
    if not width * height:
        raise BadSample("image has no pixels", f"{name}: {width} x {height}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadSample("image is too narrow", f"{name}: {width} x {height} pixels, limit {MAX_RATIO} to 1")
    try:
        image.load()
        rgb = _rgb(image, name, alpha)
    except BadSample:
        raise
    except Exception as error:  # decoders may raise anything on broken data
        raise BadSample("image is broken", f"{name}: {error}") from None
    try:
        # Read after loading: Pillow turns TIFF images upright by itself and then drops the tag.
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data: the pixels are still good
        orientation = 1
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _rgb(image: Image.Image, name: str, alpha: str) -> Image.Image:
    """Convert any mode to RGB; always returns a new image."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image, name, alpha)
    if image.mode == "F":
        raise BadSample("image of floating-point values", name)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data and alpha == "white":
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image, name: str, alpha: str) -> Image.Image:
    # Pillow's own conversion clips at 255. Mode "I" holds 16-bit values too (PGM); larger values have no known range.
    given = np.asarray(image)
    if given.min() < 0 or given.max() > 65_535:
        raise BadSample("image of 32-bit values", f"{name}: from {given.min()} to {given.max()}")
    values = given.astype(np.uint32)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and alpha == "white":
        values[given == transparent] = 65_535
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
