"""Resize and normalise images for a vision encoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Pixels. The square around a longer image would take gigabytes, so the image is shrunk first.
_LONGEST_PADDED = 8192


@dataclass(frozen=True)
class ImageTransform:
    """Turns a PIL image into a normalised tensor; contains no module, so it can be sent to worker processes."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize: str = "squash"

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an RGB image as float32 ``[3, H, W]``."""
        height, width = self.size
        if self.resize == "pad" and image.width != image.height:
            if max(image.size) > _LONGEST_PADDED:
                image = image.copy()
                image.thumbnail((_LONGEST_PADDED, _LONGEST_PADDED))
            side = max(image.size)
            colour = tuple(int(255 * m) for m in self.mean)
            square = Image.new("RGB", (side, side), colour)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        resample = INTERPOLATION[self.interpolation]
        if self.resize == "crop":
            scale = max(height / image.height, width / image.width)
            size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            image = image if size == image.size else image.resize(size, resample)
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            image = image.crop((left, top, left + width, top + height))
        elif image.size != (width, height):
            image = image.resize((width, height), resample)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def blank(self) -> Image.Image:
        """Return a black image of the encoder's size."""
        height, width = self.size
        return Image.new("RGB", (width, height))
