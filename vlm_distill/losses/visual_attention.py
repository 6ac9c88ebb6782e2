"""Visual attention: where the decoder's middle layers look in an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import LossError
from .feature_loss import FeatureLoss, Shape
from .parameters import check_choice
from .softmax import upcast

QUERIES = ("all", "answers")


@dataclass(frozen=True)
class AttentionFeature:
    """The attention that a decoder pays to image tokens, as a feature.

    Attributes:
        start, stop: shares of the decoder's depth between which its layers are read, from 0 to 1.
        queries: which tokens attend: ``all`` of a sample, or those that predict its ``answers``.
    """

    start: float
    stop: float
    queries: str

    @property
    def name(self) -> str:
        """The feature's name, from which :meth:`parse` makes it again."""
        return f"attention:{self.start:g}:{self.stop:g}:{self.queries}"

    @classmethod
    def parse(cls, name: str) -> AttentionFeature | None:
        """Return the feature of this name; ``None`` if the name is another kind's."""
        kind, *rest = name.split(":")
        return cls(float(rest[0]), float(rest[1]), rest[2]) if kind == "attention" and len(rest) == 3 else None


class VisualAttention(FeatureLoss):
    """1 − the mean over layers of cos(Ā_t, A_s), A the attention to a sample's image tokens (CompoDistill, 2025).

    A is ``[queries, image tokens]``, a mean over heads, taken as a vector. Of k layers of the student, the j-th is
    compared with the mean over the teacher's layers j to j + m − k, of its m.

    Args:
        layers: shares of the decoders' depth between which layers are compared, ``[start, stop]``; of n layers, those
            from start · n rounded down to stop · n rounded up.
        queries: whose attention: ``all`` tokens of a sample, which must be the same in both models, or those that
            predict its ``answers``.
    """

    unit = "sample"

    def __init__(self, layers: Sequence[float] = (0.3, 0.7), queries: str = "all") -> None:
        super().__init__()
        if not _is_range(layers):
            raise LossError(
                f"loss visual_attention: layers is {layers!r}; give two shares of the depth, as in [0.3, 0.7]"
            )
        check_choice("loss visual_attention: queries", queries, QUERIES)
        self.feature = AttentionFeature(float(layers[0]), float(layers[1]), queries)
        self.student_features = self.teacher_features = (self.feature.name,)
        self.alike = frozenset({"image tokens", "text tokens"} if queries == "all" else {"image tokens"})

    def prepare(self, student: Mapping[str, Shape], teacher: Mapping[str, Shape]) -> None:
        mine, theirs = student[self.feature.name][1], teacher[self.feature.name][1]
        if mine > theirs:
            raise LossError(
                f"loss visual_attention: the student has {mine} layers there, the teacher {theirs}; each of the "
                "student's needs one of the teacher's"
            )

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        mine = upcast(student[self.feature.name])  # [T, k, Q], zeros behind a sample's queries
        theirs = teacher[self.feature.name].to(mine.dtype)  # [T, m, Q]
        _, counts = samples.unique_consecutive(return_counts=True)
        if not len(counts):
            return mine.sum((1, 2))  # of no tokens: empty, and in the graph
        group = theirs.shape[1] - mine.shape[1] + 1
        theirs = theirs.unfold(1, group, 1).mean(-1)
        tokens = counts.tolist()
        losses = [_distance(*both) for both in zip(mine.split(tokens), theirs.split(tokens), strict=True)]
        return torch.stack(losses)


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − the mean over layers of the cosine (0-d) of a sample's attention ``[tokens, layers, queries]``."""
    mine, theirs = (x.transpose(0, 1).flatten(1) for x in (student, teacher))
    return 1 - F.cosine_similarity(mine, theirs, dim=-1).mean()


def _is_range(layers: Any) -> bool:
    """Return whether these are two shares, the first below the second."""
    if not isinstance(layers, Sequence) or isinstance(layers, str) or len(layers) != 2:
        return False
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in layers)
    return numbers and 0 <= layers[0] < layers[1] <= 1
