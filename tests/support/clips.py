"""Small files of videos, and data that show them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


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


def write_data(folder: Path, rounds: int = 3) -> Path:
    """Rows that show a video, an image, nothing, and a broken video in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    write_clip(folder / "clip.mp4")
    (folder / "broken.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:700])
    Image.new("RGB", (60, 30), "red").save(folder / "picture.png")
    parts = [
        {"type": "video", "video": "clip.mp4"},
        {"type": "image", "image": "picture.png"},
        {"type": "text", "text": "Only a text."},
        {"type": "video", "video": "broken.mp4"},
    ]
    rows = []
    for part in parts * rounds:
        content = [part, {"type": "text", "text": "Which colour?"}]
        answer = {"role": "assistant", "content": "It is red."}
        rows.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
    (folder / "data.jsonl").write_text("\n".join(rows))
    return folder / "data.jsonl"
