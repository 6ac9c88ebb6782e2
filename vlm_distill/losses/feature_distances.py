"""Distances between features of student and teacher: hidden states, image features, projected image features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import LossError
from .feature_loss import FeatureLoss, Shape
from .parameters import check_choice
from .softmax import upcast

DISTANCES = ("mse", "normalised_mse", "cosine")


class _Distances(FeatureLoss):
    """The mean distance of some pairs of features, through a learned projection if their widths differ."""

    def __init__(self, name: str, pairs: Sequence[tuple[str, str]], distance: str) -> None:
        super().__init__()
        self.name = name
        self.distance = check_choice(f"loss {name}: distance", distance, DISTANCES)
        self.student_features, self.teacher_features = (tuple(names) for names in zip(*pairs, strict=True))
        self.projections = nn.ModuleList()

    def prepare(self, student: Mapping[str, Shape], teacher: Mapping[str, Shape]) -> None:
        for mine, other in zip(self.student_features, self.teacher_features, strict=True):
            (count, width), (teacher_count, teacher_width) = student[mine], teacher[other]
            if count is not None and teacher_count is not None:
                self._common_side(count, teacher_count)
            same = width == teacher_width
            self.projections.append(nn.Identity() if same else nn.Linear(width, teacher_width))

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        names = zip(self.student_features, self.teacher_features, self.projections, strict=True)
        return torch.stack([self._compare(p, student[mine], teacher[other]) for mine, other, p in names]).mean(0)

    def _compare(self, projection: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        if student.ndim == 3 and (side := self._common_side(student.shape[1], teacher.shape[1])):
            student, teacher = average_down(upcast(student), side), average_down(upcast(teacher), side)
        if isinstance(projection, nn.Linear):
            student = projection(student.to(projection.weight.dtype))
        student = upcast(student)
        return self._distance(student, teacher.to(student.dtype))

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.distance == "cosine":
            distance = 1.0 - F.cosine_similarity(student, teacher, dim=-1)
        else:
            if self.distance == "normalised_mse":
                student, teacher = (F.layer_norm(x, x.shape[-1:]) for x in (student, teacher))
            distance = (student - teacher).square().mean(-1)
        return distance if distance.ndim == 1 else distance.mean(1)

    def _common_side(self, student: int, teacher: int) -> int | None:
        """Return the side of the grid that both are brought to; ``None`` if they have equally many tokens."""
        if student == teacher:
            return None
        sides = [math.isqrt(student), math.isqrt(teacher)]
        for tokens, side in zip((student, teacher), sides, strict=True):
            if side**2 != tokens:
                raise LossError(
                    f"loss {self.name}: an image is {student} tokens for the student and {teacher} for the teacher, "
                    f"and {tokens} form no square grid; make them equal (select: patch leaves the class token out)"
                )
        return min(sides)


def average_down(features: Tensor, side: int) -> Tensor:
    """Average features ``[n, tokens, width]``, a square in row-major order, down to ``side × side`` tokens."""
    square = features.transpose(1, 2).unflatten(2, (math.isqrt(features.shape[1]), -1))
    return F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)


class HiddenStates(_Distances):
    """Distance of chosen layers' hidden states at the distilled tokens, as in FitNets (Romero et al., 2015).

    Args:
        layers: student's layer: teacher's layer; 0 is the embeddings, −1 the last layer after the final norm.
        distance: ``mse`` (mean over width), ``normalised_mse`` (of layer-normalised features), ``cosine`` (1 − cos).
    """

    def __init__(self, layers: Mapping[int, int] | None = None, distance: str = "mse") -> None:
        layers = {-1: -1} if layers is None else layers
        if not _is_layers(layers):
            raise LossError(
                f"loss hidden_states: layers is {layers!r}; give whole numbers, student's layer: teacher's layer, "
                "as in {-1: -1, 4: 8}"
            )
        super().__init__("hidden_states", [(f"hidden.{a}", f"hidden.{b}") for a, b in layers.items()], distance)


def _is_layers(layers: Any) -> bool:
    """Return whether this is a mapping from whole numbers to whole numbers."""

    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool)

    return isinstance(layers, Mapping) and bool(layers) and all(whole(a) and whole(b) for a, b in layers.items())


class VisionFeatures(_Distances):
    """Distance of the vision encoders' outputs, a mean over an image's tokens; a finer square grid is averaged down.

    Args:
        distance: ``mse`` (mean over width), ``normalised_mse`` (of layer-normalised features), ``cosine`` (1 − cos).
    """

    unit = "image"
    spans_tokenizers = True
    matches = True

    def __init__(self, distance: str = "mse") -> None:
        super().__init__("vision_features", [("vision", "vision")], distance)


class ProjectorFeatures(_Distances):
    """Distance of the projectors' outputs, a mean over an image's tokens; a finer square grid is averaged down.

    Args:
        distance: ``mse`` (mean over width), ``normalised_mse`` (of layer-normalised features), ``cosine`` (1 − cos).
    """

    unit = "image"
    spans_tokenizers = True
    matches = True

    def __init__(self, distance: str = "mse") -> None:
        super().__init__("projector_features", [("projector", "projector")], distance)
