"""Put encoded samples into micro-batches: rows padded or packed, and everything indexed in the pairs' order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import isqrt
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlm_distill.losses.groups import TokenGroups

from .alignment import difference_of
from .attempts import attempt, checked
from .batch import (
    DistillationBatch,
    Encoded,
    ModelBatch,
    ModelInputs,
    Origin,
    Processor,
    RecordedProcessor,
    RecordedSample,
    SampleId,
    lacks_images,
)
from .conversation import Conversation, Document
from .encoding import EVERY_ANSWER, Pair, Part, Turns, encode_document, encode_pairs
from .errors import BadSample
from .teacher_view import View


class LoadedSample(NamedTuple):
    """A sample as it was read, its images decoded, and which one of the mixture it is."""

    sample: Conversation | Document
    images: Sequence[Image.Image]
    sample_id: SampleId | None = None


@dataclass(frozen=True)
class Collator:
    """Turns samples into micro-batches, as a run is configured.

    Attributes:
        student, teacher: the models' processors; the teacher is optional.
        max_length: the most tokens in a row of either model.
        turns: which answers of conversations are trained on.
        grouped: whether the models have different tokenizers.
        packed: whether conversations share rows, for the student and for the teacher.
        alike: what both models must have alike in a sample: ``image tokens`` (their number), ``image tiles`` (the
            number of images or tiles), ``image grids`` (square, if they differ), ``text tokens`` (the same ones in the
            same places).
        view: what the teacher sees of a sample, if not the same; ``None`` also if its outputs are cached, since then
            samples are only looked up.
    """

    student: Processor
    teacher: Processor | None
    max_length: int
    turns: Turns = EVERY_ANSWER
    grouped: bool = False
    packed: tuple[bool, bool] = (False, False)
    alike: frozenset[str] = frozenset()
    view: View | None = None

    def encode(
        self,
        sample: Conversation | Document,
        images: Sequence[Image.Image] = (),
        sample_id: SampleId | None = None,
    ) -> list[Pair]:
        """Return a sample's pairs: one for a conversation (or for each answer if they are split), or one for each
        piece of a document. Raise ``BadSample`` if it cannot be encoded.

        With ``sample_id``, which a cached teacher needs, the pairs get origins.
        """
        return checked(self.encode_all([LoadedSample(sample, images, sample_id)])[0])

    def encode_all(self, samples: Sequence[LoadedSample]) -> list[list[Pair] | BadSample]:
        """Return for each sample what :meth:`encode` returns, or the ``BadSample`` that it raises.

        The models' processors are asked once for all samples, which is faster with small images and short texts.
        """
        cut = [attempt(self._cut, sample) for sample in samples]
        parts = list(chain.from_iterable(found for found in cut if not isinstance(found, BadSample)))
        pairs = iter(encode_pairs(parts, self.student, self.max_length, turns=self.turns, grouped=self.grouped))
        found: list[list[Pair] | BadSample] = []
        for sample, own in zip(samples, cut, strict=True):
            if isinstance(own, BadSample):
                found.append(own)
            else:
                found.append(attempt(self._sample_pairs, sample, list(islice(pairs, len(own)))))
        return found

    def _cut(self, loaded: LoadedSample) -> list[Part]:
        """Return the parts of a conversation that become a pair each; none for a document."""
        sample, images, _ = loaded
        if isinstance(sample, Document):
            return []
        teacher = self._teacher_of(loaded)
        parts = []
        for number, (part, shown) in enumerate(self.turns.parts(sample, images)):
            other = teacher
            if self.turns.split and isinstance(teacher, RecordedSample):
                other = teacher.answer(number, sample, images)
            seen = None if self.view is None else self.view.of(part, shown)
            parts.append(Part(part, shown, other, seen))
        return parts

    def _teacher_of(self, loaded: LoadedSample) -> Processor | None:
        """Return what encodes a sample for the teacher."""
        if isinstance(self.teacher, RecordedProcessor) and loaded.sample_id is not None:
            return self.teacher.at(loaded.sample_id)
        return self.teacher

    def _sample_pairs(self, loaded: LoadedSample, encoded: Sequence[Pair | BadSample]) -> list[Pair]:
        """Return a sample's pairs, given those of its parts. Raise ``BadSample`` if one of them is bad."""
        sample, _, sample_id = loaded
        if isinstance(sample, Document):
            pairs = encode_document(sample, self.student, self._teacher_of(loaded), self.max_length)
        else:
            pairs = []
            for result in encoded:
                pair = checked(result)
                if pair.teacher is not None:
                    self.check_alike(pair.student, pair.teacher)
                pairs.append(replace(pair, samples=0) if pairs else pair)
        return pairs if sample_id is None else add_origins(pairs, sample_id)

    def check_alike(self, student: Encoded, teacher: Encoded) -> None:
        """Raise ``BadSample`` if the models differ in what must be alike. A sample without images is not compared."""
        same = student is teacher and "image tiles" not in self.alike
        if not self.alike or same or not student.images:
            return
        assert self.teacher is not None
        masks = self.student.image_tokens(student), self.teacher.image_tokens(teacher)
        ours, theirs = (int(mask.sum()) for mask in masks)
        if "image tokens" in self.alike and ours != theirs:
            raise BadSample("image tokens differ", f"{ours} for the student, {theirs} for the teacher")
        if "image tiles" in self.alike:
            blocks = self.student.image_blocks(student), self.teacher.image_blocks(teacher)
            _check_blocks(*blocks, square="image grids" in self.alike)
        if "text tokens" in self.alike:
            _check_text(*map(_with_marks, (student, teacher), masks))

    def parts(
        self, sample: Conversation | Document, images: Sequence[Image.Image]
    ) -> list[tuple[Conversation | Document, Sequence[Image.Image]]]:
        """Return the conversation, or part of one, and the images that the teacher sees behind each of its pairs."""
        if isinstance(sample, Document):
            return [(sample, images)]
        parts = self.turns.parts(sample, images)
        return [*parts] if self.view is None else [self.view.of(*part) for part in parts]

    def collators_of(self, source: int) -> Mapping[str, Collator]:
        """Return what encodes a source's samples for the student and each of their teachers alone, by name.

        A single teacher's name is empty.
        """
        return {"": self}

    def join_pairs(self, source: int, pairs: Mapping[str, Pair]) -> Pair:
        """Return a sample's pair, given that with each of its teachers."""
        return pairs[""]

    def batch(self, pairs: Sequence[Pair]) -> DistillationBatch:
        """Return a micro-batch of these pairs, packed where that is configured."""
        return collate(
            pairs,
            self.student,
            self.teacher,
            grouped=self.grouped,
            packed=self.packed,
            tiled="image tiles" in self.alike,
        )


def _with_marks(row: Encoded, image: Tensor) -> list[int]:
    """Return a sample's ids with −1 for each run of image tokens."""
    again = image & torch.cat([image.new_zeros(1), image[:-1]])
    return row.input_ids.masked_fill(image, -1)[~again].tolist()


def _check_text(student: list[int], teacher: list[int]) -> None:
    """Raise ``BadSample`` if the models' ids differ; an image is −1."""
    if student == teacher:
        return
    ours = [token for token in student if token >= 0]
    theirs = [token for token in teacher if token >= 0]
    what = "the images stand elsewhere" if ours == theirs else difference_of(ours, theirs)
    raise BadSample("text tokens differ", f"{what}; compare at the answers alone (`queries` or `text`: answers)")


def _check_blocks(student: list[int], teacher: list[int], *, square: bool) -> None:
    """Raise ``BadSample`` if images or tiles of these numbers of tokens cannot be matched."""
    if len(student) != len(teacher):
        raise BadSample("image tiles differ", f"{len(student)} for the student, {len(teacher)} for the teacher")
    for ours, theirs in zip(student, teacher, strict=True):
        if square and ours != theirs and any(isqrt(tokens) ** 2 != tokens for tokens in (ours, theirs)):
            raise BadSample(
                "image grids are not square",
                f"{ours} tokens for the student, {theirs} for the teacher; use match: hungarian",
            )


def add_origins(pairs: Sequence[Pair], sample_id: SampleId) -> list[Pair]:
    """Return a sample's pairs with their origins."""
    found, start = [], 0
    for pair in pairs:
        tokens = int((pair.teacher or pair.student).supervised.sum())
        found.append(replace(pair, origins=(Origin(*sample_id, start, tokens),)))
        start += tokens
    return found


def collate(
    pairs: Sequence[Pair],
    student: Processor,
    teacher: Processor | None,
    *,
    grouped: bool = False,
    packed: tuple[bool, bool] = (False, False),
    tiled: bool = False,
) -> DistillationBatch:
    """Return a micro-batch of any number of samples, zero included.

    If a model has a vision encoder and no sample an image (or, where videos go in as videos, no sample a video), or if
    there is no sample at all, both models get a dummy row with a blank one and no supervised token: every rank then
    runs the same modules, and no rank waits for another.

    Args:
        pairs: the encoded samples.
        student: the student's processor.
        teacher: the teacher's processor, or ``None`` if the pairs have no teacher.
        grouped: whether the pairs have groups; a micro-batch without samples then has (empty) groups too.
        packed: as in :class:`Collator`.
        tiled: whether to count the image tokens of each image or tile.

    Returns:
        The batch. Per-token tensors follow the order of ``pairs``, even where samples share a packed row: ``positions``
        are ``[N]`` indices of the tokens before the supervised ones, over all rows. If one processor serves both
        models, both models' inputs are the same tensors; so are pixels that both processors made once.
    """
    ours = [pair.student for pair in pairs]
    theirs = [pair.teacher for pair in pairs if pair.teacher is not None]
    if _needs_dummy(student, ours) or (teacher is not None and _needs_dummy(teacher, theirs)):
        ours.append(student.dummy())
        if teacher is not None:
            theirs.append(teacher.dummy())

    documents = [pair.document for pair in pairs]
    student_batch = _model_batch(student, ours, [pair.student_tokens for pair in pairs], documents, packed[0], tiled)
    teacher_batch = None
    if teacher is not None:
        tokens = [pair.teacher_tokens for pair in pairs]
        if teacher is student and packed[0] == packed[1] and _are_one(pairs):
            teacher_batch = replace(student_batch, inputs=ModelInputs(student_batch.inputs))
        else:
            teacher_batch = _model_batch(teacher, theirs, tokens, documents, packed[1], tiled)
            if packed == (False, False):
                _share_tensors(student_batch.inputs, teacher_batch.inputs, ours, theirs)

    lengths = torch.tensor([len(pair.student_tokens) for pair in pairs], dtype=torch.int64)
    return DistillationBatch(
        student=student_batch,
        teacher=teacher_batch,
        targets=_concatenate([pair.student.input_ids[pair.student_tokens] for pair in pairs]),
        distilled=_concatenate([pair.distilled for pair in pairs], torch.bool),
        sample_of=torch.arange(len(pairs)).repeat_interleave(lengths),
        samples=sum(pair.samples for pair in pairs),
        images=sum(pair.student.images for pair in pairs),
        groups=collate_groups(pairs) if grouped else None,
        origins=tuple(chain.from_iterable(pair.origins for pair in pairs)),
    )


def _concatenate(parts: Sequence[Tensor], dtype: torch.dtype = torch.int64) -> Tensor:
    """Concatenate one-dimensional tensors, or return an empty one if there are none."""
    return torch.cat([torch.empty(0, dtype=dtype), *parts])


def _share_tensors(
    student: ModelInputs, teacher: ModelInputs, ours: Sequence[Encoded], theirs: Sequence[Encoded]
) -> None:
    """Let the teacher have the student's tensors that were made of the same ones, such as pixels."""
    for name in student.keys() & teacher.keys():
        mine = [row.tensors[name] for row in ours if name in row.tensors]
        other = [row.tensors[name] for row in theirs if name in row.tensors]
        if mine and len(mine) == len(other) and all(map(_in_same_memory, mine, other)):
            teacher[name] = student[name]


def _in_same_memory(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def _are_one(pairs: Sequence[Pair]) -> bool:
    """Return whether both models have the very same encodings and supervised tokens."""
    return all(pair.teacher is pair.student and pair.teacher_tokens is pair.student_tokens for pair in pairs)


def _needs_dummy(processor: Processor, samples: list[Encoded]) -> bool:
    return not samples or lacks_images(processor, samples)


def collate_groups(pairs: Sequence[Pair]) -> TokenGroups:
    """Return the pairs' groups, with token numbers counted through the micro-batch."""
    ours, theirs = [torch.empty(0, 2, dtype=torch.int64)], [torch.empty(0, 2, dtype=torch.int64)]
    targets = []
    student_tokens = teacher_tokens = 0
    for pair in pairs:
        assert pair.groups is not None
        assert pair.teacher is not None
        ours.append(pair.groups[0] + student_tokens)
        theirs.append(pair.groups[1] + teacher_tokens)
        targets.append(pair.teacher.input_ids[pair.teacher_tokens])
        student_tokens += len(pair.student_tokens)
        teacher_tokens += len(pair.teacher_tokens)
    return TokenGroups(torch.cat(ours), torch.cat(theirs), _concatenate(targets))


def _model_batch(
    processor: Processor,
    samples: list[Encoded],
    tokens: list[Tensor],
    documents: list[bool],
    packed: bool,
    tiled: bool,
) -> ModelBatch:
    """Put samples into rows, packed where they may share one.

    A packed row is no longer than the longest sample: packing then saves padding at no cost, since attention with a
    mask grows with the square of the row. A variable-length kernel has no such cost and gets a single row.

    Args:
        processor: the model's.
        samples: those of the pairs, and possibly a dummy at the end.
        tokens: for each pair, the indices of its supervised tokens.
        documents: for each pair, whether it is plain text.
        packed: whether conversations and dummies are packed too.
        tiled: whether to count the image tokens of each image or tile.
    """
    # Records of a cache are indexed by pair and never reach a model: they must not change places.
    may_pack = not isinstance(processor, RecordedProcessor)
    shared = [may_pack and (packed or (i < len(documents) and documents[i])) for i in range(len(samples))]
    lengths = [len(sample.input_ids) for sample in samples]
    rows = _assign_rows(lengths, shared, sum(lengths) if processor.one_row else max(lengths))

    joined = []
    for row in rows:
        together = [samples[i] for i in row]
        joined.append(processor.join(together) if shared[row[0]] else together[0])
    inputs = processor.collate(joined)

    # Where each sample begins in the flattened rows.
    starts = [0] * len(samples)
    for number, row in enumerate(rows):
        position = number * inputs["input_ids"].shape[1]
        for i in row:
            starts[i] = position
            position += lengths[i]

    images = [sample.images for sample in samples]
    nothing = torch.empty(0, dtype=torch.int64)
    at_images = [processor.image_tokens(s).nonzero().flatten() if s.images else nothing for s in samples]
    image_tokens = [len(indices) for indices in at_images]
    blocks = [processor.image_blocks(s) for s in samples[: len(tokens)] if s.images] if tiled else []
    return ModelBatch(
        inputs,
        _shifted(tokens, starts) - 1,
        _in_pair_order(rows, images, len(tokens)),
        _in_pair_order(rows, image_tokens, len(tokens)),
        _shifted(at_images[: len(tokens)], starts),
        torch.tensor(image_tokens[: len(tokens)], dtype=torch.int64),
        torch.tensor([starts[: len(tokens)], lengths[: len(tokens)]], dtype=torch.int64).T,
        torch.tensor([*chain.from_iterable(blocks)], dtype=torch.int64),
        sum(lengths),
    )


def _assign_rows(lengths: list[int], shared: list[bool], limit: int) -> list[list[int]]:
    """Return the sample numbers of each row: samples alone first, then the packed ones."""
    rows = [[i] for i in range(len(lengths)) if not shared[i]]
    together = [i for i in range(len(lengths)) if shared[i]]
    for row in pack([lengths[i] for i in together], limit):
        rows.append([together[i] for i in row])
    return rows


def _in_pair_order(rows: list[list[int]], counts: list[int], pairs: int) -> Tensor:
    """Return indices in row order of items, ``counts[i]`` of them belonging to sample ``i``.

    They are listed in the pairs' order; the dummy's are left out.
    """
    starts, seen = [0] * len(counts), 0
    for i in chain.from_iterable(rows):
        starts[i] = seen
        seen += counts[i]
    return _shifted([torch.arange(count) for count in counts[:pairs]], starts)


def _shifted(indices: Sequence[Tensor], shifts: Sequence[int]) -> Tensor:
    """Concatenate indices, each tensor's moved by a number of its own; further numbers are ignored."""
    lengths = torch.tensor([len(own) for own in indices], dtype=torch.int64)
    own_shifts = torch.tensor(shifts[: len(indices)], dtype=torch.int64)
    return _concatenate(indices) + own_shifts.repeat_interleave(lengths)


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Assign sequences to rows of at most ``limit`` tokens by first-fit-decreasing: the longest first, each into the
    first row with room for it.
    """
    rows: list[list[int]] = []
    used: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((i for i, taken in enumerate(used) if taken + lengths[number] <= limit), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(number)
        used[row] += lengths[number]
    return rows
