"""Losses on classifiers' features: the outputs of their stages, ``[n, channels, h, w]``, and pooled, ``[n, width]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_distill.losses import FeatureLoss, LossError
from vlm_distill.losses.parameters import check_flag, check_number
from vlm_distill.losses.softmax import upcast

Layers = Mapping[int | str, int | str]


class _Stages(FeatureLoss):
    """A loss between pairs of stages, the student's and the teacher's."""

    unit = "image"

    def __init__(self, name: str, layers: Layers, *, pooled: bool) -> None:
        super().__init__()
        self.name = name
        if not isinstance(layers, Mapping) or not layers:
            raise self._mistake(layers, pooled)
        student, teacher = [], []
        for own, other in layers.items():
            own_name, other_name = _feature(own, pooled), _feature(other, pooled)
            if own_name is None or other_name is None:
                raise self._mistake(layers, pooled)
            student.append(own_name)
            teacher.append(other_name)
        self.student_features, self.teacher_features = tuple(student), tuple(teacher)

    def _mistake(self, layers: Any, pooled: bool) -> LossError:
        """Return the error for layers that are not pairs of stages."""
        also = ", or pooled" if pooled else ""
        return LossError(
            f"loss {self.name}: layers is {layers!r}; give numbers of stages{also}, student's: teacher's, as in "
            "{1: 1, -1: -1}"
        )

    def _pairs(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the features in pairs, in the student's precision, float32 at least."""
        pairs = []
        for own, other in zip(self.student_features, self.teacher_features, strict=True):
            feature = upcast(student[own])
            pairs.append((feature, teacher[other].to(feature.dtype)))
        return pairs


def _feature(given: Any, pooled: bool) -> str | None:
    """Return the name of the feature that a configuration calls by a stage's number; ``None`` if there is none."""
    if isinstance(given, int) and not isinstance(given, bool) and given != 0:
        return f"stage{given}"
    return "pooled" if pooled and given == "pooled" else None


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average both ``[n, channels, h, w]`` down to the smaller height and width (adaptive average pooling)."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    a, b = (x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return a, b


class FitNet(_Stages):
    """FitNet's hints, mean (r(s) − t)², r learnt: 1×1 convolution, batch norm, ReLU (Romero et al., ICLR 2015).

    A mean over an image's channels and positions, summed over the pairs. The larger of two maps is averaged down to the
    other's size.

    Args:
        layers: student's stage: teacher's stage; −1 is the last, ``pooled`` what the classification layer reads.
        relu: whether r ends in a ReLU, for teachers whose features come out of one; a ViT's do not.
    """

    def __init__(self, layers: Layers | None = None, relu: bool = True) -> None:
        super().__init__("fitnet", {2: 2} if layers is None else layers, pooled=True)
        self.relu = check_flag("loss fitnet: relu", relu)
        self.regressors = nn.ModuleList()

    def prepare(self, student: Mapping[str, tuple[Any, ...]], teacher: Mapping[str, tuple[Any, ...]]) -> None:
        for mine, other in zip(self.student_features, self.teacher_features, strict=True):
            if len(student[mine]) != len(teacher[other]):
                raise LossError(f"loss fitnet: {mine} and {other} cannot be compared: only one of them is a map")
            channels, teacher_channels = student[mine][0], teacher[other][0]
            layers = [nn.Conv2d(channels, teacher_channels, 1), nn.BatchNorm2d(teacher_channels)]
            self.regressors.append(nn.Sequential(*layers, *([nn.ReLU()] if self.relu else [])))

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        summands = []
        for (mine, other), regressor in zip(self._pairs(student, teacher), self.regressors, strict=True):
            s, t = _same_size(*(x if x.ndim == 4 else x[:, :, None, None] for x in (mine, other)))
            made = regressor(s.to(next(regressor.parameters()).dtype))
            summands.append((upcast(made) - t).square().mean((1, 2, 3)))
        return torch.stack(summands).sum(0)


class AttentionTransfer(_Stages):
    """Attention transfer, mean (a_s − a_t)², a = Σ_channels x² at unit length (Zagoruyko & Komodakis, ICLR 2017).

    A mean over an image's positions, summed over the pairs. The larger of two maps is first averaged down to the
    other's size.

    Args:
        layers: student's stage: teacher's stage; −1 is the last.
    """

    def __init__(self, layers: Layers | None = None) -> None:
        super().__init__("attention_transfer", {1: 1, 2: 2, 3: 3} if layers is None else layers, pooled=False)

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        summands = []
        for pair in self._pairs(student, teacher):
            s, t = (F.normalize(x.square().mean(1).flatten(1)) for x in _same_size(*pair))
            summands.append((s - t).square().mean(1))
        return torch.stack(summands).sum(0)


class SimilarityPreserving(_Stages):
    """Similarity preserving, ‖G_s − G_t‖²/n², G = x xᵀ with rows at unit length (Tung & Mori, ICCV 2019).

    x holds the batch's features ``[n, channels·h·w]``; sizes and widths may differ between the models. Summed over the
    pairs.

    Args:
        layers: student's stage: teacher's stage; −1 is the last, ``pooled`` what the classification layer reads.
    """

    whole_batch = True

    def __init__(self, layers: Layers | None = None) -> None:
        super().__init__("similarity_preserving", {-1: -1} if layers is None else layers, pooled=True)

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        summands = []
        for own, other in self._pairs(student, teacher):
            s, t = own.flatten(1), other.flatten(1)
            summands.append((F.normalize(s @ s.T) - F.normalize(t @ t.T)).square().mean())
        return torch.stack(summands).sum()


class RelationalKD(FeatureLoss):
    """Relational KD, Huber losses of distances and angles between a batch's pooled features (Park et al., CVPR 2019).

    Distances between two images are divided by their mean over the pairs that do not coincide; angles are cosines at
    one image between two others. Both are means over all pairs and triples, including those with an image twice, as in
    the authors' code; where images coincide, direction and angle are 0. Memory grows with n²·width + n³.

    Args:
        distance: weight of the distances.
        angle: weight of the angles.
    """

    unit = "image"
    whole_batch = True
    student_features = teacher_features = ("pooled",)

    def __init__(self, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__()
        self.distance = check_number("loss relational_kd: distance", distance, 0.0)
        self.angle = check_number("loss relational_kd: angle", angle, 0.0)

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        mine = upcast(student["pooled"])
        s, s_angles = _relations(mine)
        t, t_angles = _relations(teacher["pooled"].to(mine.dtype))
        return self.distance * F.smooth_l1_loss(s, t) + self.angle * F.smooth_l1_loss(s_angles, t_angles)


def _relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute distances ``[n, n]`` over their mean, and cosines ``[n, n, n]`` at the first image, of ``[n, width]``."""
    gaps = x.unsqueeze(0) - x.unsqueeze(1)
    squares = gaps.square().sum(-1)
    apart = squares > 0
    # A square root has no derivative at 0, and none should flow there.
    lengths = torch.where(apart, squares, 1.0).sqrt()
    directions = gaps / lengths.unsqueeze(-1)
    distances = torch.where(apart, lengths, 0.0)
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0), directions @ directions.mT
