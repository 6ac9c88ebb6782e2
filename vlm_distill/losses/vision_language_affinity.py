"""Vision-language affinity: how similar each image token of a sample is to each of its text tokens, in both models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .feature_loss import IMAGE_HIDDEN, TEXT_HIDDEN, TEXT_SAMPLES, FeatureLoss
from .parameters import check_choice
from .softmax import upcast


class VisionLanguageAffinity(FeatureLoss):
    """Smooth L1 between the models' cosines of image and text tokens (VLAD of EM-KD, 2025).

    The cosines are those of last hidden states, ``[image tokens, text tokens]`` a sample; its loss is their mean
    distance.

    Args:
        text: ``all`` text tokens of a sample, which must be the same in both models, or the positions that predict its
            ``answers``.
    """

    unit = "sample"
    matches = True

    def __init__(self, text: str = "all") -> None:
        super().__init__()
        self.text = check_choice("loss vision_language_affinity: text", text, ("all", "answers"))
        self.student_features = (IMAGE_HIDDEN, f"{TEXT_HIDDEN}:{text}", f"{TEXT_SAMPLES}:{text}")
        self.teacher_features = self.student_features
        self.alike = frozenset({"image tokens", "text tokens"} if text == "all" else {"image tokens"})

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        image, text, of_text = self.student_features
        mine = upcast(student[image]), upcast(student[text])
        theirs = teacher[image].to(mine[0].dtype), teacher[text].to(mine[0].dtype)
        if not len(samples):
            return mine[0].sum(-1) + 0 * mine[1].sum()  # of no tokens: empty, and in the graph
        losses = []
        for sample in samples.unique_consecutive().tolist():
            within = samples == sample, student[of_text] == sample
            student_cosines, teacher_cosines = (_affinity(x[within[0]], y[within[1]]) for x, y in (mine, theirs))
            losses.append(F.smooth_l1_loss(student_cosines, teacher_cosines))
        return torch.stack(losses)


def _affinity(image: Tensor, text: Tensor) -> Tensor:
    """Return the cosines ``[n, m]`` of the tokens ``[n, width]`` and ``[m, width]``."""
    return F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
