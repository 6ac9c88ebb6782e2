"""A frozen vision encoder that student and teacher share: it runs once a micro-batch and is in memory once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.batch import DistillationBatch, ModelInputs
from data.errors import UserError

from .interface import VisionLanguageModel
from .lora import WithoutAdapters
from .weightless import weightless


def has_same_vision(student: VisionLanguageModel, teacher: VisionLanguageModel) -> bool:
    """Return whether the student's image parts are frozen and the same as the teacher's, by settings and weights.

    Both models must be whole on this rank. Weights are compared in the teacher's precision; without weights they are
    taken to be equal.
    """
    student, teacher = _whole(student), _whole(teacher)
    try:
        mine, other = (nn.ModuleDict(model.image_parts) for model in (student, teacher))
    except UserError:
        return False
    if type(student) is not type(teacher) or any(p.requires_grad for p in mine.parameters()):
        return False
    weights, others = mine.state_dict(), other.state_dict()
    if student.vision_settings != teacher.vision_settings or weights.keys() != others.keys():
        return False
    return weightless() or all(
        torch.equal(weights[name].to(theirs.device, theirs.dtype), theirs) for name, theirs in others.items()
    )


def share_vision_weights(student: VisionLanguageModel, teacher: VisionLanguageModel) -> None:
    """Let the student's image parts use the teacher's memory, after :func:`has_same_vision` found them to be the same.

    Call this when the student is on its device. Parameters in different precisions stay separate.
    """
    mine, other = (nn.ModuleDict(_whole(model).image_parts) for model in (student, teacher))
    for parameter, theirs in zip(mine.parameters(), other.parameters(), strict=True):
        if (parameter.dtype, parameter.device) == (theirs.dtype, theirs.device):
            parameter.data = theirs.data


def _whole(model: VisionLanguageModel) -> VisionLanguageModel:
    return model.model if isinstance(model, WithoutAdapters) else model


def with_vision_features(batch: DistillationBatch, seen: Tensor) -> ModelInputs:
    """Return the student's inputs with the teacher's ``vision_features`` in place of pixels."""
    if batch.images:  # not the dummy row's
        ours, theirs = batch.student, batch.teacher
        assert theirs is not None
        # One entry an image, or one a token if images have different numbers of tokens.
        images = seen.dim() == 3
        mine, other = (ours.images, theirs.images) if images else (ours.image_tokens, theirs.image_tokens)
        seen = seen[other][mine.argsort()]
    # A video's own input stays: the teacher's features are of images alone.
    inputs = batch.student.inputs.items()
    kept = {name: t for name, t in inputs if not name.startswith("pixel_") or name == "pixel_values_videos"}
    return ModelInputs(kept, vision_features=seen)
