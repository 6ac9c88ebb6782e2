"""Videos: a file becomes frames at even moments, which every model of a run sees, within limits of time and memory."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from PIL import Image

from .conversation import VideoFile
from .errors import BadSample, UserError
from .images import local_file

# Containers that hold their own pictures. Excluded are playlists and scripts, which name other files and addresses.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif,asf"
# A later moment than this is sought from the nearest key frame instead of decoding everything before it.
_SEEK_SECONDS = 8.0


@dataclass(frozen=True)
class VideoLimits:
    """How a video is sampled, and which videos are refused.

    Attributes:
        fps: frames a second.
        max_frames: the most frames; a longer video gives as many, further apart.
        max_seconds: the longest video.
        timeout: seconds that reading one video may take.
    """

    fps: float = 1.0
    max_frames: int = 16
    max_seconds: float = 3600.0
    timeout: float = 60.0


@dataclass(frozen=True)
class Frame:
    """Where a frame is in its video; a frame's image part has one under ``frame``.

    Attributes:
        video: number of the video in its sample.
        index: number of the frame in the file.
        fps, total: of the file: frames a second, and number of frames.
    """

    video: int
    index: int
    fps: float
    total: int


def check_installed() -> None:
    """Raise ``UserError`` if no package that reads videos is installed."""
    if find_spec("av") is None:
        raise UserError("data.video: PyAV reads videos, and is not installed; install vlm-distill[video]")


def moments(seconds: float, limits: VideoLimits) -> list[float]:
    """Return when frames are taken, in seconds: every ``1 / fps``, or evenly spread if these would be too many."""
    step = max(1 / limits.fps, seconds / limits.max_frames)
    # A rounding error must not add a frame at the very end.
    count = min(limits.max_frames, max(1, int(seconds / step - 1e-9) + 1))
    return [number * step for number in range(count)]


def read_video(
    video: VideoFile, number: int, limits: VideoLimits, *, roots: Sequence[Path] = (), max_pixels: int
) -> list[tuple[Image.Image, Frame]]:
    """Return a video's frames at its :func:`moments`, upright and in RGB.

    Args:
        video: a file, or the bytes of one.
        number: of the video in its sample.
        limits: of its length and of the time to read it.
        roots: as in :func:`~data.images.load_image`.
        max_pixels: the most pixels of all frames together.

    Raises:
        BadSample: the file is missing, empty, no video, broken, too long or too large, or takes too long to read.
    """
    import av

    content = video.source
    file: IO[bytes]
    if not content:
        raise BadSample("video file is empty", "0 bytes")
    if isinstance(content, bytes):
        name, file = f"{len(content)} bytes", io.BytesIO(content)
    else:
        name, file = content, open(local_file(content, roots, "video"), "rb")  # noqa: SIM115
    deadline = time.monotonic() + limits.timeout
    try:
        with closing(file), av.open(file, options={"format_whitelist": _CONTAINERS}) as container:
            reader = _Reader(name, container, limits, deadline, max_pixels)
            return [(image, Frame(number, index, reader.fps, reader.total)) for image, index in reader.frames()]
    except BadSample:
        raise
    except Exception as error:  # FFmpeg's errors are of many kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise BadSample("video is broken", f"{name}: {reason}") from None


class _Reader:
    """Reads the frames of an opened container; see :func:`read_video`."""

    def __init__(self, name: str, container: Any, limits: VideoLimits, deadline: float, max_pixels: int) -> None:
        if not container.streams.video:
            raise BadSample("video has no pictures", name)
        self.name, self.container, self.limits = name, container, limits
        self.deadline, self.max_pixels = deadline, max_pixels
        self.stream = container.streams.video[0]
        # The worker has one core, and every thread of a decoder keeps frames of its own.
        self.stream.codec_context.thread_count = 1
        self.fps = float(self.stream.average_rate or 0)
        self.seconds = self._seconds()
        self.total = max(1, round(self.seconds * self.fps))

    def _seconds(self) -> float:
        """Return the video's length. Raise ``BadSample`` if it is unknown or beyond the limit."""
        stream, container = self.stream, self.container
        if stream.duration is not None and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / 1e6
        else:
            seconds = 0.0
        if seconds <= 0 or self.fps <= 0:
            raise BadSample("video is broken", f"{self.name}: does not give its length or its frame rate")
        if seconds > self.limits.max_seconds:
            raise BadSample("video is too long", f"{self.name}: {seconds:,.0f} s, limit {self.limits.max_seconds:,.0f}")
        return seconds

    def frames(self) -> Iterator[tuple[Image.Image, int]]:
        """Yield each moment's image and its number in the file."""
        wanted = moments(self.seconds, self.limits)
        context = self.stream.codec_context
        self._check_size(context.width, context.height, len(wanted))
        decoded, at, image = self.container.decode(self.stream), -1.0, None
        for moment in wanted:
            if moment - max(at, 0.0) > _SEEK_SECONDS:
                self._seek(moment)
                decoded, at = self.container.decode(self.stream), -1.0
            # The frame that is shown at the moment, give or take half a frame.
            while image is None or at < moment - 0.5 / self.fps:
                self._check_time()
                found = next(decoded, None)
                if found is None:
                    raise BadSample("video is broken", f"{self.name}: no frame at {moment:.1f} s of {self.seconds:.1f}")
                if found.time is None:
                    raise BadSample("video is broken", f"{self.name}: a frame without a time")
                at, image = found.time - self._start(), found
            self._check_size(image.width, image.height, len(wanted))
            yield _upright(image), min(self.total - 1, max(0, round(at * self.fps)))

    def _start(self) -> float:
        """Return the time of the first frame, which need not be 0."""
        return float((self.stream.start_time or 0) * self.stream.time_base)

    def _seek(self, moment: float) -> None:
        self.container.seek(int((moment + self._start()) / self.stream.time_base), stream=self.stream)

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise BadSample("video takes too long to read", f"{self.name}: over {self.limits.timeout:g} s")

    def _check_size(self, width: int, height: int, frames: int) -> None:
        if frames * width * height > self.max_pixels:
            raise BadSample(
                "video is too large",
                f"{self.name}: {frames} frames of {width} x {height} pixels, limit {self.max_pixels} together",
            )


def _upright(frame: Any) -> Image.Image:
    """Return a frame as a person sees it: phones store a turned picture and by how much to turn it back."""
    image = frame.to_image()
    rotation = getattr(frame, "rotation", 0) % 360
    return image.rotate(rotation, expand=True) if rotation else image
