"""A frozen vision encoder that student and teacher have in common runs once a micro-batch: in the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from data.batch import DistillationBatch

from .composed import ComposedVLM
from .interface import VisionLanguageModel
from .lora import WithoutAdapters
from .weightless import weightless


def sees_as(student: VisionLanguageModel, teacher: VisionLanguageModel) -> bool:
    """Whether the student's vision encoder is frozen and is the teacher's: one module, or equal settings and weights.

    Assembled models alone, whole on this rank. Weights are compared in the teacher's precision; where there are none,
    they are taken to be equal.
    """
    if isinstance(teacher, WithoutAdapters):
        teacher = teacher.model
    if not (isinstance(student, ComposedVLM) and isinstance(teacher, ComposedVLM)):
        return False
    mine, other = student.vision_encoder, teacher.vision_encoder
    if mine is None or other is None or any(p.requires_grad for p in mine.parameters()):
        return False
    weights, others = mine.state_dict(), other.state_dict()
    if mine.settings != other.settings or weights.keys() != others.keys():
        return False
    return weightless() or all(
        torch.equal(weights[name].to(theirs.device, theirs.dtype), theirs) for name, theirs in others.items()
    )


def features_for_student(batch: DistillationBatch, features: Tensor) -> Tensor:
    """The teacher's ``vision`` features ``[images, tokens, C]`` in the order of the images in the student's rows."""
    if not batch.images:
        return features  # of the dummy row
    assert batch.teacher is not None
    return features[batch.teacher.images][batch.student.images.argsort()]
