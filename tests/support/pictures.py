"""A folder of images small enough for a test, like ImageNet's: ten classes, each a colour and the place of a stripe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = 10
VIT = {"patch_size": 8, "depth": 2, "num_heads": 2}


def make_images(folder: Path, per_class: int = 6, broken: tuple[int, ...] = (), size: int = 20, seed: int = 0) -> Path:
    """``folder/class0/0.png`` …; the images whose number (through all classes) is in ``broken`` are no images."""
    random = np.random.default_rng(seed)
    for label in range(CLASSES):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        for i in range(per_class):
            pixels = random.normal(128, 20, (size, size, 3))
            pixels[:, :, label % 3] += 60
            pixels[2 * label : 2 * label + 3] += 90
            path = place / f"{i}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            if label * per_class + i in broken:
                path.write_bytes(b"no image")
    return folder


def vit(width: int = 16, **changes: Any) -> dict[str, Any]:
    """A classifier's section: a vision transformer of two blocks for images of 16 pixels."""
    return {"name": "vit_tiny_patch16_224", "image_size": 16, "config": {**VIT, "embed_dim": width}, **changes}


def config(folder: Path, images: Path, teacher: Path | None, **changes: Any) -> dict[str, Any]:
    """A run's configuration as plain data; ``changes`` are ``section__key=value``."""
    plain: dict[str, Any] = {
        "student": vit(),
        "loss": [{"name": "kd", "weight": 0.9}, {"name": "cross_entropy", "weight": 0.5}],
        "data": {"train": [{"path": str(images), "name": "images"}], "workers": 0},
        "optimizer": {"name": "momentum", "lr": 0.05},
        "training": {"steps": 5, "batch_size": 16, "micro_batch_size": 4, "device": "cpu"},
        "deepspeed": {"stage": 0},
        "output": str(folder),
    }
    if teacher is None:
        plain["loss"] = [{"name": "cross_entropy"}]
    else:
        plain["teacher"] = {"name": str(teacher)}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            plain[section][key] = value
        else:
            plain[section] = value
    return plain
