"""A frozen vision encoder that student and teacher have in common: it runs once a micro-batch, and lies there once."""

from __future__ import annotations

import torch
from torch import Tensor

from data.batch import DistillationBatch

from .composed import ComposedVLM
from .interface import VisionLanguageModel
from .lora import WithoutAdapters
from .vision_encoders import VisionEncoder
from .weightless import weightless


def sees_as(student: VisionLanguageModel, teacher: VisionLanguageModel) -> bool:
    """Whether the student's vision encoder is frozen and is the teacher's: one module, or equal settings and weights.

    Assembled models alone, whole on this rank. Weights are compared in the teacher's precision; where there are none,
    they are taken to be equal.
    """
    mine, other = _encoder(student), _encoder(teacher)
    if mine is None or other is None or any(p.requires_grad for p in mine.parameters()):
        return False
    weights, others = mine.state_dict(), other.state_dict()
    if mine.settings != other.settings or weights.keys() != others.keys():
        return False
    return weightless() or all(
        torch.equal(weights[name].to(theirs.device, theirs.dtype), theirs) for name, theirs in others.items()
    )


def share(student: VisionLanguageModel, teacher: VisionLanguageModel) -> None:
    """Lets the student's vision encoder lie where the teacher's does, after :func:`sees_as` found them to be the same.

    To be called when the student is where it will be. Parameters in different precisions stay two.
    """
    mine, other = _encoder(student), _encoder(teacher)
    assert mine is not None
    assert other is not None
    for parameter, theirs in zip(mine.parameters(), other.parameters(), strict=True):
        if (parameter.dtype, parameter.device) == (theirs.dtype, theirs.device):
            parameter.data = theirs.data


def _encoder(model: VisionLanguageModel) -> VisionEncoder | None:
    if isinstance(model, WithoutAdapters):
        model = model.model
    return model.vision_encoder if isinstance(model, ComposedVLM) else None


def features_for_student(batch: DistillationBatch, features: Tensor) -> Tensor:
    """The teacher's ``vision`` features ``[images, tokens, C]`` in the order of the images in the student's rows."""
    if not batch.images:
        return features  # of the dummy row
    assert batch.teacher is not None
    return features[batch.teacher.images][batch.student.images.argsort()]
