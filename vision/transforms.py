"""Augmentations: how a worker turns a decoded image into a training view of 8-bit pixels."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from timm.data import auto_augment, create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms as torchvision_transforms

from vlm_distill.config.fields import Section

from .inputs import InputSettings

Transform = Callable[[Image.Image], Tensor]
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
ThreeStrengths = tuple[Strength, Strength, Strength]
FourStrengths = tuple[Strength, Strength, Strength, Strength]


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    if bits_to_keep > 0:
        return auto_augment.posterize(image, bits_to_keep)
    return Image.new(image.mode, image.size)


# timm's strongest posterization keeps no bit, for which Pillow 13 raises, whenever RandAugment happens to draw it
# (timm 1.0.31); earlier versions of Pillow made a black image.
auto_augment.NAME_TO_OP.update({name: _posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")})

# timm's names of its crops.
_TIMM_CROPS = {"random_resized": "rrc", "rkrc": "rkrc", "rkrr": "rkrr"}


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


def build_transform(inputs: InputSettings, augmentation: Augmentation | None = None) -> Transform:
    """Build the transform that a worker applies to a decoded image.

    Args:
        inputs: the model's input; its ``mean`` fills areas that an augmentation uncovers.
        augmentation: for a training view; ``None``: timm's view of evaluation.

    Returns:
        A function from an RGB image to uint8 ``[3, H, W]`` of the model's size, which draws from Python's, NumPy's and
        torch's global random numbers.
    """
    height, width = inputs.size
    size = (3, height, width)
    if augmentation is None:
        return _evaluation(inputs)
    crop = augmentation.crop
    first, colours, last = create_transform(
        size,
        is_training=True,
        separate=True,
        use_prefetcher=True,
        train_crop_mode=_TIMM_CROPS.get(crop),
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        vflip=augmentation.vflip,
        # ColorJitter draws random numbers even if it changes nothing.
        color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=augmentation.auto_augment,
        interpolation=augmentation.interpolation,
        mean=inputs.mean,
        std=inputs.std,
    )
    if crop not in _TIMM_CROPS:
        chosen = augmentation.interpolation
        mode = str_to_interp_mode(inputs.interpolation if chosen == "random" else chosen)
        # torchvision's Resize returns an image of the right size unchanged.
        steps = [torchvision_transforms.Resize((height, width), mode)]
        if crop == "pad":
            steps.append(torchvision_transforms.RandomCrop((height, width), padding=augmentation.padding))
        elif crop == "center":
            steps = _evaluation(inputs).transforms[:-1]
        if augmentation.hflip:
            steps.append(torchvision_transforms.RandomHorizontalFlip(augmentation.hflip))
        if augmentation.vflip:
            steps.append(torchvision_transforms.RandomVerticalFlip(augmentation.vflip))
        first = torchvision_transforms.Compose(steps)
    return torchvision_transforms.Compose([*first.transforms, *colours.transforms, *last.transforms])


def _evaluation(inputs: InputSettings) -> torchvision_transforms.Compose:
    return create_transform(
        (3, *inputs.size),
        is_training=False,
        use_prefetcher=True,
        interpolation=inputs.interpolation,
        mean=inputs.mean,
        std=inputs.std,
        crop_pct=inputs.crop_pct,
    )


@contextmanager
def kept_randomness(device: torch.device | None = None) -> Iterator[None]:
    """Context manager: restore the global random states of Python, NumPy, torch (and a CUDA device)."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            assert device is not None
            torch.cuda.set_rng_state(cuda, device)


def seed_randomness(*key: int, device: torch.device | None = None) -> None:
    """Seed the same global random states with a hash of integers."""
    seed = int.from_bytes(hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest(), "little")
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed would seed every device, but only the given one is restored.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index
        ].manual_seed(seed)
