"""Whether a cache of a vision encoder's features is the one that a run needs."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.fingerprint import digest_text
from vlm_distill.models.interface import VisionLanguageModel

from .image_features import FeatureCache
from .store import ABOUT, check_not_filling, compare, fingerprint


def open_features(config: RunConfig, student: VisionLanguageModel) -> FeatureCache | None:
    """Open the cache of what the student's vision encoder makes of images, if the run has one.

    Raises:
        UserError: there is no cache, or it is of another encoder.
    """
    if config.student.vision_cache is None:
        return None
    folder, identity = Path(config.student.vision_cache), feature_identity(config, student)
    # A cache that is being filled does not know how many images it will hold.
    check_not_filling(folder, "student.vision_cache")
    if not (folder / ABOUT).is_file():
        raise UserError(f"student.vision_cache: {folder} holds no cache; fill it: vlm-distill cache CONFIG")
    cache = FeatureCache(folder)
    compare(folder, "features", cache.about.get("identity", {}), identity)
    return cache


def sight_of(model: VisionLanguageModel) -> dict[str, nn.Module]:
    """Return the parts whose output the cache keeps. Raise ``UserError`` if there are none, or one is trained."""
    try:
        sight = model.image_parts
    except UserError as error:
        raise UserError(f"student.vision_cache: {error}; leave it out") from error
    for name, part in sight.items():
        if any(p.requires_grad for p in part.parameters()):
            raise UserError(
                f"student.vision_cache: features of this model are what its {name} gives, which trains; leave it out "
                "of student.train and lora.parts, or leave vision_cache out"
            )
    return sight


def feature_identity(config: RunConfig, model: VisionLanguageModel) -> dict[str, str]:
    """Return everything that decides the features of an image, each a short text by its name."""
    weights = {f"{part}.{name}": t.float() for part, m in sight_of(model).items() for name, t in m.state_dict().items()}
    return {
        "vision encoder": fingerprint(weights)[:16],
        "settings": digest_text(json.dumps(model.vision_settings, sort_keys=True, default=str)),
        "dtype": config.training.dtype,
    }
