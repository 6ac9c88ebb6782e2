"""Vision relation: how similar the image tokens of a sample are to one another, in both models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .feature_loss import IMAGE_HIDDEN, FeatureLoss
from .softmax import upcast


class VisionRelation(FeatureLoss):
    """1 − cos of the models' matrices Y Yᵀ, Y the last hidden states at a sample's image tokens (LLaVA-KD, 2024).

    The matrices are ``[tokens, tokens]``, so the models' widths may differ. A sample's loss is 0 if one matrix is a
    positive multiple of the other.
    """

    unit = "sample"
    student_features = teacher_features = (IMAGE_HIDDEN,)
    alike = frozenset({"image tokens"})
    spans_tokenizers = True
    matches = True

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        mine = upcast(student[IMAGE_HIDDEN])
        theirs = teacher[IMAGE_HIDDEN].to(mine.dtype)
        _, counts = samples.unique_consecutive(return_counts=True)
        if not len(counts):
            return mine.sum(-1)  # of no tokens: empty, and in the graph
        tokens = counts.tolist()
        losses = [_distance(*both) for both in zip(mine.split(tokens), theirs.split(tokens), strict=True)]
        return torch.stack(losses)


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cos (0-d) of the similarity matrices of ``[tokens, width]`` each."""
    mine, theirs = student @ student.T, teacher @ teacher.T
    return 1 - F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0)
