"""Augmentations: how a worker turns a decoded image into a training view of 8-bit pixels."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms as torchvision_transforms

from .augmentation import Augmentation
from .inputs import InputSettings

Transform = Callable[[Image.Image], Tensor]


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    if bits_to_keep > 0:
        return auto_augment.posterize(image, bits_to_keep)
    return Image.new(image.mode, image.size)


# timm's strongest posterization keeps no bit, for which Pillow 13 raises, whenever RandAugment happens to draw it
# (timm 1.0.31); earlier versions of Pillow made a black image.
auto_augment.NAME_TO_OP.update({name: _posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")})

# timm's names of its crops.
_TIMM_CROPS = {"random_resized": "rrc", "rkrc": "rkrc", "rkrr": "rkrr"}


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
