"""Check that a feature cache fits a run: same vision encoder, same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.fingerprint import digest_text
from vlm_distill.models.interface import VisionLanguageModel

from .image_features import FeatureCache
from .store import ABOUT, check_not_filling, compare, fingerprint, read_about


def open_features(config: RunConfig, student: VisionLanguageModel) -> FeatureCache | None:
    """Open the cache of the student's image features, if the run has one.

    Raises:
        UserError: there is no cache, or it has another identity.
    """
    if config.student.vision_cache is None:
        return None
    folder, identity = Path(config.student.vision_cache), feature_identity(config, student)
    # Unlike a token cache, a feature cache does not know how many images it should hold.
    check_not_filling(folder, "student.vision_cache")
    if not (folder / ABOUT).is_file():
        raise UserError(f"student.vision_cache: {folder} holds no cache; fill it: vlm-distill cache CONFIG")
    cache = FeatureCache(folder)
    compare_features(folder, identity)
    return cache


def compare_features(folder: Path, identity: Mapping[str, str]) -> None:
    """Raise ``UserError`` if a feature cache has another identity."""
    compare(folder, "features", read_about(folder).get("identity", {}), identity)


def frozen_vision(model: VisionLanguageModel) -> dict[str, nn.Module]:
    """Return the parts whose output the cache keeps. Raise ``UserError`` if there are none, or one is trained."""
    try:
        parts = model.image_parts
    except UserError as error:
        raise UserError(f"student.vision_cache: {error}; leave it out") from error
    for name, part in parts.items():
        if any(p.requires_grad for p in part.parameters()):
            raise UserError(
                f"student.vision_cache: the features to cache depend on its {name}, which is trained; leave it out of "
                "student.train and lora.parts, or leave vision_cache out"
            )
    return parts


def feature_identity(config: RunConfig, model: VisionLanguageModel) -> dict[str, str]:
    """Return everything that determines the features of an image, each a short text by its name."""
    weights = {}
    for part, module in frozen_vision(model).items():
        for name, tensor in module.state_dict().items():
            weights[f"{part}.{name}"] = tensor.float()
    return {
        "vision encoder": fingerprint(weights)[:16],
        "settings": digest_text(json.dumps(model.vision_settings, sort_keys=True, default=str)),
        "dtype": config.training.dtype,
    }
