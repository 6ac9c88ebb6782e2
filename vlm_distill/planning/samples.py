"""What a run's samples look like in its models' tokens: the first of them, or full rows if there is no data yet."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from data.batch import Encoded
from data.conversation import Conversation, Document, VideoFile
from data.encoding import Pair
from data.errors import BadSample, UserError
from data.lessons import SeveralCollator
from data.sample_images import load_images
from vlm_distill.models.processor import Processor

from .models import PlannedRun

SAMPLES = 32


@dataclass(frozen=True)
class Sequences:
    """What samples look like, in the student's tokens.

    Attributes:
        sampled: number of encoded samples; 0: there was no data, and every row is assumed to be full.
        mean, p95, longest: tokens of a row.
        supervised: mean number of supervised tokens in a row.
        images: mean number of images in a row.
        bytes: mean size of a sample's text and images on disk; 0 if unknown.
    """

    sampled: int
    mean: float
    p95: int
    longest: int
    supervised: float
    images: float
    bytes: float


def has_data(run: PlannedRun) -> bool:
    """Return whether the run's data can be sampled; it may not have been downloaded yet.

    Raises:
        UserError: the data exists and cannot be read, or it is missing and the number of steps depends on it.
    """
    try:
        _ = run.sources
    except UserError:
        missing = [section.path for section in run.config.data.train if not Path(section.path).exists()]
        if not missing:
            raise
        if run.config.training.steps is None:
            raise UserError(
                f"cannot plan training.epochs: {missing[0]} (data.train) was not found; set training.steps, or point "
                "data.train at the data"
            ) from None
        return False
    return True


def sample(run: PlannedRun) -> tuple[list[Pair], Sequences]:
    """Return the first samples as the run will meet them, and what they look like.

    Raises:
        UserError: no sample can be used.
    """
    pairs, sizes, samples, reason = list[Pair](), 0.0, 0, ""
    for source, row in run.first_samples(SAMPLES):
        try:
            read = run.sources[source][row]
            shown, images = load_images(read, run.load_image)
            pairs += run.collator.encode(shown, images, (source, row))
            sizes, samples = sizes + _size(read), samples + 1
            sizes += run.feature_bytes(images)
        except BadSample as bad:
            reason = reason or str(bad)
    if not pairs:
        raise UserError(f"data.train: none of the first {SAMPLES} samples can be used; the first: {reason}")
    lengths = sorted(len(pair.student.input_ids) for pair in pairs)
    return pairs, Sequences(
        sampled=samples,
        mean=sum(lengths) / samples,
        p95=lengths[math.ceil(0.95 * len(lengths)) - 1],
        longest=lengths[-1],
        supervised=sum(len(pair.student_tokens) for pair in pairs) / samples,
        images=sum(pair.student.images for pair in pairs) / samples,
        bytes=sizes / samples,
    )


def _size(sample: Conversation | Document) -> float:
    """Return about how many bytes a sample takes on disk: its text, and the files of its images and videos."""
    if isinstance(sample, Document):
        return len(sample.text.encode())
    text = 0
    for message in sample.messages:
        text += sum(len(part["text"].encode()) for part in message["content"] if part["type"] == "text")
    stored = 0
    for image in sample.images:
        source = image.source if isinstance(image, VideoFile) else image
        if isinstance(source, bytes):
            stored += len(source)
        elif isinstance(source, str):
            stored += Path(source).stat().st_size
        else:
            stored += source.width * source.height * 3
    return text + stored


def full_row(run: PlannedRun) -> tuple[list[Pair], Sequences]:
    """Return a row of the greatest length with one image, the second half of its text supervised: without data."""
    length = run.config.data.max_length

    def filled(processor: Processor) -> Encoded:
        row = processor.dummy()
        missing = length - len(row.input_ids)
        if missing < 2:
            raise UserError(f"data.max_length: {length} tokens have no room for text after {len(row.input_ids)} others")
        full = processor.answered(row, [run.student.pad_token] * missing)
        return replace(full, supervised=torch.arange(length) >= length - missing // 2)

    own, other = run.processors
    student = filled(own)

    def paired(processor: Processor | None, grouped: bool) -> Pair:
        teacher = None if processor is None else filled(processor)
        tokens = student.supervised.nonzero().flatten()
        others = tokens if teacher is None else teacher.supervised.nonzero().flatten()
        count = min(len(tokens), len(others))
        # With another tokenizer: groups of a single token.
        single = torch.arange(count).unsqueeze(-1) + torch.tensor([0, 1])
        groups = (single, single) if grouped and teacher is not None else None
        return Pair(student, teacher, tokens[-count:], others[-count:], torch.ones(count, dtype=torch.bool), groups)

    pair = paired(other, run.grouped)
    if isinstance(run.collator, SeveralCollator):
        members = {name: run.collator.members[name] for name in run.collator.lessons[0].weights}
        taught = {name: paired(cast(Processor, one.teacher), one.grouped) for name, one in members.items()}
        pair = replace(pair, taught=taught)
    return [pair], Sequences(0, length, length, length, len(pair.student_tokens), student.images, 0.0)
