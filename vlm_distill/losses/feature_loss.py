"""``FeatureLoss``: the base of losses between features, which see what the models compute on the way to the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from .base import Loss, Match, Term

#: A feature's shape. VLMs: tokens of an image (``None`` if unknown before a run, or if it is not a feature of images)
#: and width. Classifiers: channels, height and width of a map; the width alone of the pooled output.
Shape = tuple[Any, ...]

#: The feature that losses at image tokens read: the decoder's last hidden states there.
IMAGE_HIDDEN = "image_hidden"
#: The same states at text tokens of samples with images, and which sample each is of; ``:all`` or ``:answers`` follows.
TEXT_HIDDEN, TEXT_SAMPLES = "text_hidden", "text_samples"


class FeatureLoss(Loss):
    """A loss between features of the student and features of the teacher.

    A feature's name is that of ``VisionLanguageModel.forward``.

    Attributes:
        unit: what has one value each, and is averaged over: a distilled ``token``, a real ``image``, or a ``sample``
            with images.
        whole_batch: whether it compares the images of a batch with one another and so has one value (0-d) for them.
        student_features, teacher_features: names of the features it reads.
        alike: what both models must have alike in a sample: as many ``image tokens`` (unless these are matched), or the
            same ``text tokens`` in the same places. Other samples are left out.
        spans_tokenizers: whether it reads nothing at text tokens, so that the models' tokenizers may differ.
        matches: whether it compares image tokens or features of images, which a term may match.
    """

    needs = frozenset({"teacher"})
    unit: ClassVar[Literal["token", "image", "sample"]] = "token"
    whole_batch: ClassVar[bool] = False
    student_features: tuple[str, ...] = ()
    teacher_features: tuple[str, ...] = ()
    alike: frozenset[str] = frozenset()
    spans_tokenizers: ClassVar[bool] = False
    matches: ClassVar[bool] = False

    def prepare(self, student: Mapping[str, Shape], teacher: Mapping[str, Shape]) -> None:
        """Create the loss's own parameters. Called once, before the optimizer exists.

        Args:
            student: shapes of ``student_features`` by name.
            teacher: shapes of ``teacher_features`` by name.

        Raises:
            LossError: features of these shapes cannot be compared.
        """

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        """Compute the loss; differentiable in the student's features and the loss's own parameters.

        Args:
            student: ``student_features`` by name: ``[n, width]`` for n tokens, ``[n, tokens, width]`` for n images; any
                dtype. If ``unit`` is ``sample``, the n tokens are the image tokens of all samples.
            teacher: ``teacher_features`` of the same tokens or images, detached.
            samples: int64 ``[n]``, ascending: which sample each token belongs to; not read for images.

        Returns:
            ``[n]``, float32 at least; one value per sample with images if ``unit`` is ``sample``.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FeatureTerm:
    """One summand of the training loss: a loss between features and its weight.

    Attributes:
        answers, match: as in :class:`~.base.Term`.
    """

    name: str
    loss: FeatureLoss
    weight: float = 1.0
    answers: Literal["data", "own", "both"] = "both"
    match: Match = "none"


def must_be_alike(terms: Sequence[Term | FeatureTerm]) -> frozenset[str]:
    """Return what both models must have alike in a sample, as in ``FeatureLoss.alike``, for all of the terms.

    Terms that match image tokens need as many ``image tiles``, and to pool them ``image grids`` that are square. The
    result is empty if no term compares image tokens.
    """
    found: set[str] = set()
    for term in terms:
        needs = set(term.loss.alike) if isinstance(term, FeatureTerm) else set[str]()
        if isinstance(term, Term) and term.on == "images":
            needs.add("image tokens")
        if matches_tokens(term):
            needs.discard("image tokens")
            needs |= {"image tiles", "image grids"} if term.match == "pool" else {"image tiles"}
        found |= needs
    return frozenset(found)


def matches_tokens(term: Term | FeatureTerm) -> bool:
    """Return whether a term matches the models' image tokens. Losses of whole images average grids by themselves."""
    pooled = isinstance(term, FeatureTerm) and term.loss.unit == "image" and term.match == "pool"
    return term.match != "none" and not pooled


def wanted_features(terms: Sequence[Term | FeatureTerm]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all features that the terms read, without repetition: the student's and the teacher's.

    Terms on logits at image tokens, and terms that match these, read both models' hidden states there.
    """
    student: dict[str, None] = {}
    teacher: dict[str, None] = {}
    for term in terms:
        if isinstance(term, FeatureTerm):
            student.update(dict.fromkeys(term.loss.student_features))
            teacher.update(dict.fromkeys(term.loss.teacher_features))
        if (isinstance(term, Term) and term.on == "images") or matches_tokens(term):
            student[IMAGE_HIDDEN] = teacher[IMAGE_HIDDEN] = None
    return tuple(student), tuple(teacher)
