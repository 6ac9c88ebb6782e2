"""Videos as the video input of a Transformers processor: frames put together again, with the times they are from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from data.conversation import Conversation, count_images
from data.errors import BadSample
from data.video import Frame

from .families import VIDEO_INPUTS, VideoInput


@dataclass(frozen=True)
class Video:
    """A video's frames and where each is from."""

    images: list[Image.Image]
    frames: list[Frame]

    def repeated(self, count: int) -> Video:
        """Return a video of ``count`` frames, the last one repeated."""
        missing = max(0, count - len(self.frames))
        return Video(self.images + self.images[-1:] * missing, self.frames + self.frames[-1:] * missing)


def video_input(processor: Any) -> VideoInput | None:
    """Return how a processor of Transformers takes videos; ``None`` if it has no input for them that is tried here."""
    return VIDEO_INPUTS.get(type(getattr(processor, "video_processor", None)).__name__)


def with_videos(
    conversation: Conversation, images: Sequence[Image.Image]
) -> tuple[Conversation, list[Image.Image], list[Video]]:
    """Return a conversation with a video part in place of each video's frames, its other images, and its videos.

    Raises:
        BadSample: there are not as many images as image parts.
    """
    if count_images(conversation.messages) != len(images):
        raise BadSample("images and image parts differ in number", f"{len(images)} images")
    remaining, others, videos = iter(images), list[Image.Image](), dict[int, Video]()
    messages = []
    for message in conversation.messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            frame = part.get("frame")
            if frame is None:
                parts.append(part)
                if part["type"] == "image":
                    others.append(next(remaining))
                continue
            if frame.video not in videos:
                videos[frame.video] = Video([], [])
                parts.append({"type": "video"})
            videos[frame.video].images.append(next(remaining))
            videos[frame.video].frames.append(frame)
        messages.append({**message, "content": parts})
    return replace(conversation, messages=tuple(messages)), others, list(videos.values())


def video_options(videos: Sequence[Video], frames: int | None) -> dict[str, Any]:
    """Return a processor's arguments for videos whose frames are chosen already.

    Args:
        videos: of one sample.
        frames: the number of frames that every video must have; a shorter one repeats its last. ``None``: any number.
    """
    arrays, metadata = [], []
    for video in videos:
        if frames is not None:
            video = video.repeated(frames)
        if len({image.size for image in video.images}) > 1:
            raise BadSample("video changes its size", f"{video.images[0].size} and others")
        arrays.append(np.stack([np.asarray(image) for image in video.images]))
        first, (width, height) = video.frames[0], video.images[0].size
        metadata.append(
            {
                "total_num_frames": first.total,
                "fps": first.fps,
                "duration": first.total / first.fps,
                "frames_indices": [frame.index for frame in video.frames],
                "width": width,
                "height": height,
            }
        )
    # SmolVLM's processor reads the shape of its videos before they would become tensors.
    settings = {"video_metadata": metadata, "do_sample_frames": False, "return_tensors": "pt"}
    return {"videos": arrays, "videos_kwargs": settings}


def blank_video(image: Image.Image) -> Video:
    """Return a video that shows one image, for the dummy sample."""
    return Video([image, image], [Frame(0, index, 1.0, 2) for index in range(2)])
