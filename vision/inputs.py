"""How a classifier wants its images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputSettings:
    """How a classifier wants its images.

    Attributes:
        size: height and width in pixels.
        mean, std: of the normalisation, for red, green and blue in 0..1.
        interpolation: for resizing, by timm's names.
        crop_pct: share of the resized image's side that the centre crop of an evaluation keeps.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
