"""What collation passes on: encoded samples, micro-batches for both models, and whole optimizer steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from vlm_distill.losses.groups import TokenGroups

from .attempts import attempt
from .conversation import Conversation, Document
from .errors import BadSample

#: A sample of a mixture: the number of its source, and its index in that source.
SampleId = tuple[int, int]
#: What several teachers' weighted mean is taken of.
Combine = Literal["losses", "probabilities", "logits"]


@dataclass
class Encoded:
    """A sample as one model receives it.

    Attributes:
        input_ids: int64 ``[L]``, with all image tokens.
        supervised: bool ``[L]``; true at the tokens of the assistant's answers and at their end tokens.
        ends: bool ``[L]``; true at the end tokens among the supervised ones.
        images: number of images in the sample (a processor may expand one into several tiles).
        tensors: everything else the model's collation needs, such as ``pixel_values``.
        videos: number of videos that go in as such; the frames of others are images.
        spans: int64 ``[n, 3]``, where each of the n supervised tokens is in the answers' text: the number of a piece
            of text (:func:`~data.conversation.answer_pieces`), and the token's first and last + 1 character in it.
            White space and end tokens that the template adds are below 0 or beyond the piece's end. Other text of the
            template has −1 − (the number of a neighbouring piece). Needed to align two models; ``None`` if unknown.
    """

    input_ids: Tensor
    supervised: Tensor
    ends: Tensor
    images: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    spans: Tensor | None = None
    videos: int = 0


class ModelInputs(dict[str, Tensor]):
    """All tensors that a model's forward takes, by name: ids, masks, positions, pixels."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ModelInputs:
        """Return the inputs on a device, floating-point tensors cast to ``dtype`` if one is given."""
        moved = ModelInputs()
        for name, tensor in self.items():
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            moved[name] = tensor.to(device, wanted, non_blocking=True)
        return moved


class Processor(Protocol):
    """What collation needs from a model's processor (``vlm_distill.models.processor.Processor`` is one)."""

    has_vision: bool
    #: Whether videos go in as videos, not as images.
    takes_videos: bool
    #: Whether the model wants all packed samples in a single row.
    one_row: bool

    def encode(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        """Return token ids with the supervised ones marked. Raise ``BadSample`` if the sample does not fit the model.

        Example: the question "What is it?" with one image, answered "A cat.", under a template that writes
        ``<user>…<bot>…<end>`` and an image of four tokens::

            text        <user>  <img> ×4  What is it?  <bot>  A cat .  <end>
            supervised  no      no        no           no     yes      yes
            ends        no      no        no           no     no       yes
            spans                                             (1, 0, 1), (1, 1, 5), (1, 5, 6), (1, 6, 11)

        Piece 1 is the text of the first answer (piece 0 is its thought), and its six characters are ``A cat.``
        """
        ...

    def encode_all(self, samples: Sequence[tuple[Conversation, Sequence[Image.Image]]]) -> list[Encoded | BadSample]:
        """Return what :meth:`encode` returns for each conversation with its images, or the ``BadSample`` it raises.

        Processors override this to share work among samples.
        """
        return [attempt(self.encode, *sample) for sample in samples]

    def encode_document(self, document: Document) -> Encoded:
        """Return the token ids of plain text, all supervised but the first."""
        ...

    def dummy(self) -> Encoded:
        """Return a sample with one blank image (none for a text model) and no supervised token."""
        ...

    def image_tokens(self, sample: Encoded) -> Tensor:
        """Return a bool ``[L]``: which tokens of an encoded sample are image tokens."""
        ...

    def image_blocks(self, sample: Encoded) -> list[int]:
        """Return how many image tokens each of a sample's images has, or each tile of images that are cut into tiles.

        Raises:
            BadSample: the images' tokens cannot be told apart.
        """
        ...

    def join(self, samples: Sequence[Encoded]) -> Encoded:
        """Concatenate samples into one row, in which the model keeps them apart."""
        ...

    def collate(self, samples: Sequence[Encoded]) -> ModelInputs:
        """Pad samples on the right into one batch; ``input_ids`` is ``[B, L]``."""
        ...


def lacks_images(processor: Processor, samples: Sequence[Encoded]) -> bool:
    """Return whether the model's vision encoder, or its way for videos, would not run for these samples."""
    if not processor.has_vision:
        return False
    images = any(sample.images for sample in samples)
    videos = any(sample.videos for sample in samples)
    return not images or (processor.takes_videos and not videos)


class RecordedProcessor(Processor):
    """Looks samples up instead of encoding them: replaces the processor of a teacher whose outputs are cached.

    Its samples are never packed: records are counted in the order of the pairs.
    """

    @abstractmethod
    def at(self, sample_id: SampleId) -> RecordedSample:
        """Return the processor of one sample."""


class RecordedSample(Processor):
    """Looks up one sample."""

    @abstractmethod
    def answer(self, number: int, conversation: Conversation, images: Sequence[Image.Image]) -> Processor:
        """Return the processor of one answer, for conversations whose answers are samples of their own."""


@dataclass(frozen=True)
class Origin:
    """The sample, and the tokens of it, that a part of a micro-batch holds.

    Attributes:
        source, index: identify the sample (:data:`SampleId`).
        start: number of the sample's supervised tokens before this part (a piece of a document, or an answer).
        tokens: number of supervised tokens in this part, for the teacher (for the student without a teacher).
    """

    source: int
    index: int
    start: int
    tokens: int

    @property
    def sample_id(self) -> SampleId:
        return self.source, self.index


@dataclass
class ModelBatch:
    """One model's side of a micro-batch.

    Attributes:
        inputs: the arguments of its forward.
        positions: int64 ``[N]``, indices into the flattened ``[B·L]`` of the token before each supervised token,
            that is, of the hidden state that predicts it.
        images: int64 ``[images]``, indices of the samples' images, in the samples' order, among those of the inputs.
            Images of dummy rows are left out.
        image_tokens: int64 ``[T]``, the same for the images' tokens.
        image_positions: int64 ``[T]``, indices of the same tokens into the flattened ``[B·L]``.
        image_counts: int64 ``[pairs]``, how many of them belong to each pair.
        extents: int64 ``[pairs, 2]``, the index of each pair's first token in the flattened ``[B·L]``, and how many
            tokens it has.
        image_blocks: int64 ``[blocks]``, how many image tokens each image or tile has, in the samples' order; empty
            unless losses match image tokens.
        tokens: number of tokens of samples and dummy rows, without padding.
    """

    inputs: ModelInputs
    positions: Tensor
    images: Tensor
    image_tokens: Tensor
    image_positions: Tensor
    image_counts: Tensor
    extents: Tensor
    image_blocks: Tensor
    tokens: int

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelBatch:
        """Return the same side with every tensor changed."""
        inputs = ModelInputs({name: change(tensor) for name, tensor in self.inputs.items()})
        return replace(
            self,
            inputs=inputs,
            positions=change(self.positions),
            images=change(self.images),
            image_tokens=change(self.image_tokens),
            image_positions=change(self.image_positions),
            image_counts=change(self.image_counts),
            extents=change(self.extents),
            image_blocks=change(self.image_blocks),
        )

    def tokens_of(self, pair: int, which: str) -> Tensor:
        """Return positions of a pair's tokens, ascending: of ``all``, or of those that predict its ``answers``."""
        start, tokens = self.extents[pair].tolist()
        if which == "all":
            return torch.arange(start, start + tokens, device=self.positions.device)
        return self.positions[(self.positions >= start) & (self.positions < start + tokens)]

    @property
    def image_samples(self) -> Tensor:
        """int64 ``[T]``, ascending: the number of the pair that each image token belongs to."""
        numbers = torch.arange(len(self.image_counts), device=self.image_counts.device)
        return numbers.repeat_interleave(self.image_counts)


@dataclass
class Comparison:
    """Positions of a micro-batch that are compared with one teacher of several, or with a mixture of several.

    Attributes:
        teachers: their names.
        weights: of each in the mixture, with the sum 1.
        combine: how a mixture is made; ``losses``: there is one teacher.
        weight: factor on the loss at these positions.
        rows: int64 ``[n]``, indices of these positions among the micro-batch's.
        spans: for each teacher, its first position and its last + 1 among those of its own micro-batch.
        distilled: bool ``[n]``.
        groups: the groups to compare if the teacher's tokenizer differs, otherwise ``None``.
    """

    teachers: tuple[str, ...]
    weights: tuple[float, ...]
    combine: Combine
    weight: float
    rows: Tensor
    spans: tuple[tuple[int, int], ...]
    distilled: Tensor
    groups: TokenGroups | None = None

    @property
    def count(self) -> float:
        """The number of distilled positions (or groups), times the weight."""
        return self.weight * (int(self.distilled.sum()) if self.groups is None else len(self.groups))

    def samples(self, sample_of: Tensor) -> int:
        """Return the number of samples that are compared, given those of the micro-batch's positions."""
        compared = self.distilled if self.groups is None else self.groups.student[:, 0]
        return len(sample_of[self.rows][compared].unique())

    def to(self, device: torch.device | str) -> Comparison:
        """Return the comparison on a device."""
        rows, distilled = (tensor.to(device, non_blocking=True) for tensor in (self.rows, self.distilled))
        return replace(self, rows=rows, distilled=distilled, groups=self.groups and self.groups.to(device))


@dataclass
class DistillationBatch:
    """A micro-batch: the k-th position of the student and of the teacher predict the same answer token.

    With ``groups``, the teacher has its own number of positions, and groups of positions are compared.

    Attributes:
        student: the student's side.
        teacher: the teacher's side; ``None`` when training without one. Models that receive the same inputs share their
            tensors, so that nothing may modify them in place.
        targets: int64 ``[N]``, the student's supervised token ids.
        distilled: bool ``[N]``; false where only the end tokens differ, which are not distilled.
        sample_of: int64 ``[N]``, ascending: the number of the sample (or piece of a document) each target belongs to.
        samples: number of real samples, without dummies.
        images: number of their images, without those of dummies.
        groups: the groups to compare if the tokenizers differ, otherwise ``None``.
        origins: the samples behind the teacher's positions, in the same order.
        drawn: whether the student drew the answers, so that no loss may treat them as correct.
        answer_weights: float64 ``[samples]``, factors on the losses at a sample's answers; ``None``: all count alike.
        drawn_logprobs: float32 ``[N]``, the targets' log-probabilities under the weights that drew them, where
            importance weights need them.
        conversations: the conversations behind the pairs as the teacher sees them, with decoded images, if requested.
        taught: with several teachers, by name the micro-batch of each, which holds its own samples alone; the teacher's
            side is the student's there, too.
        comparisons: with several teachers, which of their outputs are compared with which of the student's positions.
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
    answer_weights: Tensor | None = None
    drawn_logprobs: Tensor | None = None
    conversations: Sequence[tuple[Conversation | Document, Sequence[Image.Image]]] = ()
    taught: Mapping[str, DistillationBatch] = field(default_factory=dict)
    comparisons: Sequence[Comparison] = ()

    @property
    def distilled_count(self) -> float:
        """The number of positions (or groups) that are compared with teachers, weighted where they are."""
        if self.comparisons:
            return sum(comparison.count for comparison in self.comparisons)
        if self.answer_weights is not None:
            return float(self.answer_weights[self.sample_of[self._compared]].sum())
        return int(self.distilled.sum()) if self.groups is None else len(self.groups)

    @property
    def _compared(self) -> Tensor:
        """Positions that are compared with the teacher, of a group its first one: a mask or indices."""
        return self.distilled if self.groups is None else self.groups.student[:, 0]

    @property
    def distilled_samples(self) -> float:
        """The number of samples (or answers) with such positions, weighted where they are."""
        if self.comparisons:
            return sum(one.weight * one.samples(self.sample_of) for one in self.comparisons)
        found = self.sample_of[self._compared].unique()
        return len(found) if self.answer_weights is None else float(self.answer_weights[found].sum())

    @property
    def image_pairs(self) -> Tensor:
        """int64 ``[blocks]``: how many image tokens of each image or tile are matched with the other model's."""
        assert self.teacher is not None
        return torch.minimum(self.student.image_blocks, self.teacher.image_blocks)

    @property
    def teacher_targets(self) -> Tensor:
        """The token ids that the teacher's positions predict."""
        return self.targets if self.groups is None else self.groups.teacher_targets

    def to(self, device: torch.device | str) -> DistillationBatch:
        """Return the batch on a device. Tensors that both models share are moved once, and stay shared."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device, non_blocking=True)
            return moved[id(tensor)]

        return replace(
            self,
            student=self.student.map(move),
            teacher=self.teacher and self.teacher.map(move),
            targets=self.targets.to(device, non_blocking=True),
            distilled=self.distilled.to(device, non_blocking=True),
            sample_of=self.sample_of.to(device, non_blocking=True),
            groups=None if self.groups is None else self.groups.to(device),
            answer_weights=None if self.answer_weights is None else self.answer_weights.to(device),
            drawn_logprobs=None if self.drawn_logprobs is None else self.drawn_logprobs.to(device),
            taught={name: batch.to(device) for name, batch in self.taught.items()},
            comparisons=[comparison.to(device) for comparison in self.comparisons],
        )


@dataclass(frozen=True)
class Problem:
    """A sample that was left out: its source, its line in the source, and the reason."""

    source: str
    line: int
    reason: str
    detail: str = ""


@dataclass
class Step:
    """One optimizer step's share of one rank.

    Attributes:
        index: the optimizer step, counted from 0 through all epochs.
        batches: this rank's micro-batches, the same number on every rank; each has a method ``to``.
        problems: samples of this rank that were left out of this step.
        consumed: number of this rank's samples, those left out included.
        tokens: number of the student's tokens on this rank, without padding (image-text data only).
        conversations: the conversations and images behind ``batches``, by micro-batch, if these were requested.
    """

    index: int
    batches: list[Any]
    problems: list[Problem] = field(default_factory=list)
    consumed: int = 0
    tokens: int = 0
    conversations: list[list[Any]] = field(default_factory=list)

    def counts(self, *, drawn: bool | None = None) -> Mapping[str, float]:
        """Count what this rank's image-text batches are compared on.

        Supervised tokens, distilled tokens (or groups), images, the student's image tokens, pairs of matched image
        tokens, and samples that have any of these (with ``data.turns: split``, answers).

        Args:
            drawn: count only batches whose answers the student has drawn, or only those with the data's answers.
        """
        counts: dict[str, float] = {
            "supervised": 0,
            "distilled": 0,
            "images": 0,
            "image_tokens": 0,
            "matched_tokens": 0,
        }
        counts |= {"supervised_samples": 0, "distilled_samples": 0, "image_samples": 0}
        for batch in self.batches:
            if drawn is not None and batch.drawn != drawn:
                continue
            counts["supervised"] += len(batch.targets)
            counts["distilled"] += batch.distilled_count
            counts["images"] += batch.images
            counts["image_tokens"] += len(batch.student.image_positions)
            if batch.teacher is not None:
                counts["matched_tokens"] += int(batch.image_pairs.sum())
            counts["supervised_samples"] += len(batch.sample_of.unique())
            counts["distilled_samples"] += batch.distilled_samples
            counts["image_samples"] += int(batch.student.image_counts.count_nonzero())
        return counts
