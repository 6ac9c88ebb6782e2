"""Load what a sample shows: images as they are, and videos as frames, each an image part of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from .conversation import Conversation, Document, ImageSource, VideoFile
from .errors import BadSample
from .images import MAX_PIXELS, load_image
from .video import Frame, VideoLimits, read_video

S = TypeVar("S", Conversation, Document, Conversation | Document)


@dataclass(frozen=True)
class ImageLoader:
    """Decodes images, and videos if ``video`` is given; the other attributes are those of ``load_image``."""

    roots: Sequence[Path] = ()
    max_pixels: int = MAX_PIXELS
    alpha: Literal["white", "drop"] = "white"
    video: VideoLimits | None = None

    def __call__(self, source: ImageSource) -> Image.Image:
        return load_image(source, roots=self.roots, max_pixels=self.max_pixels, alpha=self.alpha)

    def frames(self, source: VideoFile, number: int) -> list[tuple[Image.Image, Frame]]:
        """Return the frames of a sample's video. Raise ``BadSample`` if it cannot be read."""
        if self.video is None:
            raise BadSample("video file", "set data.video to read the files of videos")
        return read_video(source, number, self.video, roots=self.roots, max_pixels=self.max_pixels)


def load_images(sample: S, load: Callable[[ImageSource], Image.Image]) -> tuple[S, list[Image.Image]]:
    """Return a sample with its images decoded, in the order of its image parts; a document has none.

    A video part becomes one image part a frame, with its :class:`~data.video.Frame` under ``frame``: models without an
    input for videos see several images, and the others put them together again.

    Args:
        sample: as its source reads it.
        load: decodes an image; an :class:`ImageLoader` reads videos, too.

    Raises:
        BadSample: an image or a video cannot be read.
    """
    if isinstance(sample, Document):
        return sample, []
    if not any(isinstance(source, VideoFile) for source in sample.images):
        return sample, [load(source) for source in sample.images]
    reader = load if isinstance(load, ImageLoader) else ImageLoader()
    sources, images, videos = iter(sample.images), list[Image.Image](), 0
    messages = []
    for message in sample.messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(load(next(sources)))
            if part["type"] != "video":
                parts.append(part)
                continue
            source = next(sources)
            assert isinstance(source, VideoFile)
            for image, frame in reader.frames(source, videos):
                images.append(image)
                parts.append({"type": "image", "frame": frame})
            videos += 1
        messages.append({**message, "content": parts})
    return replace(sample, messages=tuple(messages), images=tuple(images)), images
