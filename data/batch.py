"""Between a sample and a step: encoded samples, micro-batches with both models' rows, whole optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vlm_distill.losses.groups import TokenGroups

from .conversation import Conversation, Document


@dataclass
class Encoded:
    """A sample as one model receives it.

    Attributes:
        input_ids: int64 ``[L]``; image tokens are already there in their full number.
        supervised: bool ``[L]``; true at the tokens of the assistant's answers and at their end tokens.
        ends: bool ``[L]``; true at the end tokens among the supervised ones.
        images: number of images in the sample (a processor may expand one into several tiles).
        tensors: everything else the model's collation needs, such as ``pixel_values``.
        places: int64 ``[n, 3]`` for the n supervised tokens in order: the number of a piece of text
            (:func:`~data.conversation.answer_pieces`), and where in it the token begins and ends, in characters. Blanks
            and end tokens that the template adds lie below 0 or beyond the piece's end. Other text of the template has
            −1 − number of a piece next to it. Needed where there are two models; ``None`` where it is not known.
    """

    input_ids: Tensor
    supervised: Tensor
    ends: Tensor
    images: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None


class ModelInputs(dict[str, Tensor]):
    """Every tensor a model's forward takes, by name: ids, masks, positions, pixels."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ModelInputs:
        """Moved to a device; floating-point tensors cast to ``dtype`` when one is given."""
        return ModelInputs(
            {
                k: v.to(device, dtype if dtype is not None and v.is_floating_point() else v.dtype, non_blocking=True)
                for k, v in self.items()
            }
        )


class Processor(Protocol):
    """What collation needs of a model's processor (``vlm_distill.models.interface.Processor`` is one)."""

    has_vision: bool
    #: Whether the model wants all samples that share a row in one.
    one_row: bool

    def encode(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        """Token ids with the supervised ones marked. Raises ``BadSample`` where the sample does not fit the model."""
        ...

    def encode_document(self, document: Document) -> Encoded:
        """Token ids of plain text, all supervised but the first."""
        ...

    def dummy(self) -> Encoded:
        """A row with one blank image (no image for a text model) and no supervised token."""
        ...

    def image_tokens(self, sample: Encoded) -> Tensor:
        """Bool ``[L]``: which tokens of an encoded sample with images stand for them."""
        ...

    def join(self, samples: Sequence[Encoded]) -> Encoded:
        """Samples in one row, which a model that can tells apart."""
        ...

    def collate(self, samples: Sequence[Encoded]) -> ModelInputs:
        """Samples padded on the right into one batch; ``input_ids`` is ``[B, L]``."""
        ...


@dataclass(frozen=True)
class Origin:
    """Where a part of a micro-batch comes from.

    Attributes:
        source, row: the sample's, as the mixture numbers them.
        start: supervised tokens of the sample before this part: a piece of a document, or an answer.
        tokens: supervised tokens of the teacher's row of it (of the student's without a teacher).
    """

    source: int
    row: int
    start: int
    tokens: int


@dataclass
class ModelBatch:
    """One model's side of a micro-batch.

    Attributes:
        inputs: what its forward takes.
        positions: int64 ``[N]``, indices into the flattened ``[B·L]`` of the token before each supervised token,
            that is, of the hidden state that predicts it.
        images: int64 ``[images]``, where the samples' images, in the samples' order, stand among those of the inputs.
            Dummy rows' images are not among them.
        image_tokens: int64, the same of the images' tokens.
        tokens: tokens of samples and dummy rows, padding not counted.
    """

    inputs: ModelInputs
    positions: Tensor
    images: Tensor
    image_tokens: Tensor
    tokens: int

    def to(self, device: torch.device | str) -> ModelBatch:
        positions, images, tokens = (
            x.to(device, non_blocking=True) for x in (self.positions, self.images, self.image_tokens)
        )
        return ModelBatch(self.inputs.to(device), positions, images, tokens, self.tokens)


@dataclass
class DistillationBatch:
    """A micro-batch: the k-th position of the student and of the teacher predict the same answer token.

    With ``groups`` the teacher has positions of its own number, and groups of positions are compared.

    Attributes:
        student: the student's rows.
        teacher: the teacher's rows; ``None`` when training without one.
        targets: int64 ``[N]``, the student's supervised token ids.
        distilled: bool ``[N]``; false where only the end tokens differ and the loss to the teacher is left out.
        sample_of: int64 ``[N]``, ascending: the number of the sample (or piece of a document) each target belongs to.
        samples: number of real samples (dummy rows not counted).
        images: number of their images; dummy rows' images are not among them.
        groups: what is compared where the tokenizers differ, otherwise ``None``.
        origins: where the teacher's positions come from, in their order.
        drawn: whether the answers are the student's own, which no loss may take for right ones.
        conversations: what the rows are of, with decoded images, where that was asked for.
    """

    student: ModelBatch
    teacher: ModelBatch | None
    targets: Tensor
    distilled: Tensor
    sample_of: Tensor
    samples: int
    images: int = 0
    groups: TokenGroups | None = None
    origins: tuple[Origin, ...] = ()
    drawn: bool = False
    conversations: Sequence[tuple[Conversation | Document, Sequence[Image.Image]]] = ()

    @property
    def teacher_targets(self) -> Tensor:
        """The tokens that the teacher's positions predict."""
        return self.targets if self.groups is None else self.groups.teacher_targets

    def to(self, device: torch.device | str) -> DistillationBatch:
        return replace(
            self,
            student=self.student.to(device),
            teacher=self.teacher and self.teacher.to(device),
            targets=self.targets.to(device, non_blocking=True),
            distilled=self.distilled.to(device, non_blocking=True),
            sample_of=self.sample_of.to(device, non_blocking=True),
            groups=None if self.groups is None else self.groups.to(device),
        )


@dataclass(frozen=True)
class Problem:
    """A sample that was left out: where it stands and why."""

    source: str
    line: int
    reason: str
    detail: str = ""


@dataclass
class Step:
    """One optimizer step's share of one rank.

    Attributes:
        index: the optimizer step, counted from 0 through all epochs.
        batches: this rank's micro-batches, the same number on every rank; each has ``to``.
        problems: samples of this rank that were left out of this step.
        rows: rows of the data that this rank's share was made of, those left out included.
        tokens: (of text) student tokens of this rank, padding not counted.
        samples: the conversations behind ``batches``, micro-batch by micro-batch (only where asked for).
    """

    index: int
    batches: list[Any]
    problems: list[Problem] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    samples: list[list[Any]] = field(default_factory=list)

    def counts(self) -> Mapping[str, int]:
        """Of image-text batches: images and supervised tokens of this rank, those (or groups) of them distilled."""
        return {
            "supervised": sum(len(b.targets) for b in self.batches),
            "distilled": sum(int(b.distilled.sum()) if b.groups is None else len(b.groups) for b in self.batches),
            "images": sum(b.images for b in self.batches),
        }
