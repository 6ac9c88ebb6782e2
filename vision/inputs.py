"""The image size and normalisation that a classifier expects."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputSettings:
    """The images that a classifier expects.

    Attributes:
        size: height and width in pixels.
        mean, std: normalisation of red, green and blue in 0..1.
        interpolation: of resizing, one of timm's names.
        crop_pct: share of the resized image's side that evaluation's centre crop keeps.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
