"""Small files of videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_clip(path: Path, *, seconds: int = 3, rate: int = 10, step: float = 8) -> Path:
    """A video of 64 × 48 pixels that turns red, by ``step`` a frame."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(seconds * rate):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[..., 0] = int(step * number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
