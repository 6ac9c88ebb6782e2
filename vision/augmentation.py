"""Settings of a classifier's training views: augmentation, random erasing, mixing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from vlm_distill.config.fields import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
ThreeStrengths = tuple[Strength, Strength, Strength]
FourStrengths = tuple[Strength, Strength, Strength, Strength]


class Augmentation(Section):
    """How to make a training view of an image. The defaults are timm's for ImageNet.

    CIFAR's standard recipe is ``crop: pad`` and ``color_jitter: 0``; a deterministic view is ``crop: center``,
    ``hflip: 0`` and ``color_jitter: 0``.
    """

    crop: Literal["random_resized", "pad", "resize", "center", "rkrc", "rkrr"] = Field(
        "random_resized",
        description="`random_resized`: a crop of random size (Inception's); `pad`: `padding` black pixels on each "
        "side, then a random window of the model's size; `resize`: the whole image, squeezed to that size; `center`: "
        "the view of evaluation; `rkrc`, `rkrr`: timm's crops, which keep the aspect ratio. `pad` and `resize` do not "
        "resample an image that already has the size.",
    )
    scale: tuple[float, float] | None = Field(
        None, description="Smallest and largest share of the image's area in a random crop; by default timm's."
    )
    ratio: tuple[float, float] | None = Field(
        None, description="Smallest and largest width / height of a random crop; by default timm's."
    )
    padding: int = Field(4, ge=0, description="Pixels on each side, for `pad`.")
    interpolation: Literal["random", "nearest", "bilinear", "bicubic", "lanczos"] = Field(
        "random",
        description="`random` takes bilinear or bicubic by chance in a random crop, and the model's own otherwise.",
    )
    hflip: Probability = Field(0.5, description="Probability of mirroring left and right.")
    vflip: Probability = Field(0.0, description="Probability of mirroring top and bottom.")
    color_jitter: Strength | ThreeStrengths | FourStrengths = Field(
        0.4,
        description="Largest relative change of brightness, contrast and saturation, or three or four numbers, the "
        "fourth for the hue. As in timm, ignored if `auto_augment` is set (other than `3a`).",
    )
    auto_augment: str | None = Field(
        None, description="A policy as timm writes it: `rand-m9-mstd0.5-inc1`, `augmix-m5-w4-d2`, `original`, `3a`."
    )

    @field_validator("scale", "ratio")
    @classmethod
    def _a_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError("give the least and the greatest, both greater than 0")
        return value

    @field_validator("auto_augment")
    @classmethod
    def _a_policy(cls, value: str | None) -> str | None:
        if value is None:
            return None
        from timm.data import auto_augment  # takes seconds

        kinds = {
            "rand": auto_augment.rand_augment_transform,
            "augmix": auto_augment.augment_and_mix_transform,
        }
        try:
            kinds.get(value.split("-")[0], auto_augment.auto_augment_transform)(value, {})
        except Exception:  # timm's parser raises anything for a wrong policy
            raise ValueError("not a policy of timm; for example rand-m9-mstd0.5-inc1 or augmix-m5-w4-d2") from None
        return value


class Erasing(Section):
    """Random erasing (Zhong et al. 2017), as timm applies it to normalised images."""

    probability: Probability = Field(0.0, description="Probability that an image loses a rectangle.")
    mode: Literal["const", "rand", "pixel"] = Field(
        "pixel",
        description="What fills the rectangle: the mean colour (`const`), one random colour (`rand`), noise (`pixel`).",
    )
    count: int = Field(1, ge=1, description="Largest number of rectangles in an image.")


class Mixing(Section):
    """Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019), as timm does them."""

    mixup: Strength = Field(0.0, description="Parameter of Mixup's beta distribution; 0: no Mixup.")
    cutmix: Strength = Field(0.0, description="Parameter of CutMix's beta distribution; 0: no CutMix.")
    probability: Probability = Field(1.0, description="Probability that a batch (a pair, an image) is mixed.")
    switch: Probability = Field(0.5, description="Probability of CutMix where both are on.")
    mode: Literal["batch", "pair", "elem"] = Field(
        "batch",
        description="Draw once per `batch`, per `pair` of images that are mixed with each other, or per image: `elem`.",
    )
