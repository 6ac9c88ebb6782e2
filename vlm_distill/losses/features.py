"""Losses on features: hidden states, image features and relations between tokens, teacher's beside student's.

They see what the models' forwards return under the names of ``VisionLanguageModel.forward``, never logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Loss, Term, check_choice, upcast
from .errors import LossError

#: Of a feature: tokens an image (``None`` where that is not known before a run, or it is not of images) and width; of a
#: classifier's map channels, height and width, and of its pooled output the width alone.
Shape = tuple[Any, ...]

DISTANCES = ("mse", "normalised_mse", "cosine")


class FeatureLoss(Loss):
    """A loss between features of the student and features of the teacher.

    Attributes:
        unit: what it has one value for, and is averaged over: distilled ``token`` or real ``image``.
        whole_batch: whether it compares the images of a batch with one another, and so has one value (0-d) for them.
        student_features, teacher_features: names of what it reads.
    """

    needs = frozenset({"teacher"})
    unit: ClassVar[Literal["token", "image"]] = "token"
    whole_batch: ClassVar[bool] = False
    student_features: tuple[str, ...] = ()
    teacher_features: tuple[str, ...] = ()

    def prepare(self, student: Mapping[str, Shape], teacher: Mapping[str, Shape]) -> None:
        """Told both models' shapes, by feature; makes what is learned. Called once, before the optimizer exists.

        Raises:
            LossError: features of these shapes cannot be compared.
        """

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        """The definition; gradients flow to the student's features and to what is learned.

        Args:
            student: ``student_features``: ``[n, width]`` at n tokens, or ``[n, tokens, width]`` of n images; any dtype.
            teacher: ``teacher_features`` of the same tokens or images, detached.
            samples: int64 ``[n]``, ascending: which sample each token belongs to (of images: not read).

        Returns:
            ``[n]``, float32 at least.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FeatureTerm:
    """One summand of the training loss that compares features."""

    name: str
    loss: FeatureLoss
    weight: float = 1.0


def wanted_features(terms: Sequence[Term | FeatureTerm]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every feature that the terms read, once: the student's and the teacher's."""
    found = [term.loss for term in terms if isinstance(term, FeatureTerm)]
    return (
        tuple(dict.fromkeys(name for loss in found for name in loss.student_features)),
        tuple(dict.fromkeys(name for loss in found for name in loss.teacher_features)),
    )


class _Compared(FeatureLoss):
    """A mean of distances between pairs of features, through a learned projection where their widths differ."""

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
                self._side(count, teacher_count)
            same = width == teacher_width
            self.projections.append(nn.Identity() if same else nn.Linear(width, teacher_width))

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        names = zip(self.student_features, self.teacher_features, self.projections, strict=True)
        return torch.stack([self._compare(p, student[mine], teacher[other]) for mine, other, p in names]).mean(0)

    def _compare(self, projection: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        if student.ndim == 3 and (side := self._side(student.shape[1], teacher.shape[1])):
            student, teacher = _pooled(upcast(student), side), _pooled(upcast(teacher), side)
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

    def _side(self, student: int, teacher: int) -> int | None:
        """Side of the grid that both are brought to; ``None`` where they have equally many tokens."""
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


def _pooled(features: Tensor, side: int) -> Tensor:
    """``[n, tokens, width]`` in row-major order on a square, averaged down to ``side × side``."""
    square = features.transpose(1, 2).unflatten(2, (math.isqrt(features.shape[1]), -1))
    return F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)


class HiddenStates(_Compared):
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
    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool)

    return isinstance(layers, Mapping) and bool(layers) and all(whole(a) and whole(b) for a, b in layers.items())


class VisionFeatures(_Compared):
    """Distance of the vision encoders' outputs, a mean over an image's tokens; a finer square grid is averaged down.

    Args:
        distance: ``mse`` (mean over width), ``normalised_mse`` (of layer-normalised features), ``cosine`` (1 − cos).
    """

    unit = "image"

    def __init__(self, distance: str = "mse") -> None:
        super().__init__("vision_features", [("vision", "vision")], distance)


class ProjectorFeatures(_Compared):
    """Distance of the projectors' outputs, a mean over an image's tokens; a finer square grid is averaged down.

    Args:
        distance: ``mse`` (mean over width), ``normalised_mse`` (of layer-normalised features), ``cosine`` (1 − cos).
    """

    unit = "image"

    def __init__(self, distance: str = "mse") -> None:
        super().__init__("projector_features", [("projector", "projector")], distance)


class MiniLM(FeatureLoss):
    """KL between the relations of the last layers' queries, keys and values (MiniLMv2, Wang et al., 2021).

    A relation is softmax(x xᵀ/√d) between a sample's distilled tokens, for each of ``relation_heads`` equal parts of x,
    the queries (keys, values) of all heads side by side: heads and widths may differ between the models. A token's loss
    is the sum over the three of KL(teacher‖student), each a mean over the parts. No token is hidden from those before
    it, since nothing is predicted here.

    Args:
        relation_heads: into how many parts; it must divide all widths (with shared keys that of the keys too).
    """

    student_features = teacher_features = ("queries", "keys", "values")

    def __init__(self, relation_heads: int = 8) -> None:
        super().__init__()
        if not isinstance(relation_heads, int) or isinstance(relation_heads, bool) or relation_heads < 1:
            raise LossError(f"loss minilm: relation_heads is {relation_heads!r}; give a whole number of at least 1")
        self.relation_heads = relation_heads

    def prepare(self, student: Mapping[str, Shape], teacher: Mapping[str, Shape]) -> None:
        widths = [(role, name, shapes[name][1]) for role, shapes in (("student", student), ("teacher", teacher))
                  for name in self.student_features]  # fmt: skip
        for role, name, width in widths:
            if width % self.relation_heads:
                most = math.gcd(*(width for _, _, width in widths))
                raise LossError(
                    f"loss minilm: {self.relation_heads} relation_heads do not divide the {role}'s {name} of width "
                    f"{width}; give a divisor of {most}"
                )

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        # Samples of any length in one padded tensor: [samples, longest].
        _, sample, counts = samples.unique_consecutive(return_inverse=True, return_counts=True)
        place = torch.arange(len(samples), device=samples.device) - (counts.cumsum(0) - counts)[sample]
        real = torch.arange(max(counts.tolist(), default=0), device=samples.device) < counts.unsqueeze(1)
        summands = []
        for name in self.student_features:
            mine = upcast(student[name])
            log_q = self._relation(mine, sample, place, real)
            log_p = self._relation(teacher[name].to(mine.dtype), sample, place, real)
            divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True)
            summands.append(divergence.sum(-1).mean(1)[sample, place])
        return torch.stack(summands).sum(0)

    def _relation(self, x: Tensor, sample: Tensor, place: Tensor, real: Tensor) -> Tensor:
        """Log-probabilities ``[samples, parts, longest, longest]`` of ``x [n, width]``, over a sample's real tokens."""
        parts = x.unflatten(-1, (self.relation_heads, -1))
        padded = x.new_zeros(*real.shape, *parts.shape[1:]).index_put((sample, place), parts).transpose(1, 2)
        scores = padded @ padded.transpose(-1, -2) / math.sqrt(padded.shape[-1])
        # Not −∞: padding's own rows are made too, and their differences would be NaN before they are left out.
        return scores.masked_fill(~real[:, None, None, :], torch.finfo(x.dtype).min).log_softmax(-1)
