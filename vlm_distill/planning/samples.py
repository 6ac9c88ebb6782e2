"""What a run's samples look like in its models' tokens: the first of them, or rows that are taken to be full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from data.batch import Encoded
from data.conversation import Conversation, Document
from data.encoding import Pair
from data.errors import BadSample, UserError
from data.mixture import Mixture
from data.plain_text import TextSource
from data.sources import Source
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.interface import Processor
from vlm_distill.training.build import image_loader, open_sources

from .models import Models

SAMPLES = 32
Sources = list[Source | TextSource]


@dataclass(frozen=True)
class Sequences:
    """What samples look like, in the student's tokens.

    Attributes:
        sampled: how many samples were encoded; 0: there were no data, and every row is taken to be full.
        mean, p95, longest: tokens of a row.
        supervised: tokens of answers in a mean row.
        images: in a mean row.
        bytes: on disk of a mean sample's text and images; 0 where unknown.
    """

    sampled: int
    mean: float
    p95: int
    longest: int
    supervised: float
    images: float
    bytes: float


def open_training(config: RunConfig) -> Sources | None:
    """What the run will learn from; ``None`` where that is not there yet.

    Raises:
        UserError: it is there and cannot be read, or it is not and the run's length would follow from it.
    """
    data = config.data
    try:
        return open_sources(data.train, data.max_length)
    except UserError:
        if all(Path(section.path).exists() for section in data.train):
            raise
        if config.training.steps is None:
            raise UserError(
                "data.train: not there, so that nobody knows how many steps training.epochs are; set training.steps"
            ) from None
        return None


def sample(config: RunConfig, sources: Sources | None, models: Models) -> tuple[list[Pair], Sequences, float]:
    """Pairs as the run will meet them, what they look like, and steps of an epoch.

    Args:
        config: the run's.
        sources: from :func:`open_training`.
        models: what the pairs are for.

    Raises:
        UserError: no sample can be used.
    """
    if sources is None:
        return _assumed(models)
    collator, data = models.collator(), config.data
    weights = [section.weight for section in data.train]
    mixture = Mixture(sources, weights, seed=config.training.seed, batch_size=config.training.batch_size)
    first = Mixture(sources, weights, seed=config.training.seed, batch_size=SAMPLES)
    load, pairs, sizes, samples, reason = image_loader(data), list[Pair](), 0.0, 0, ""
    for source, row in first.samples_of(0):
        try:
            sample = sources[source][row]
            images = [] if isinstance(sample, Document) else [load(image) for image in sample.images]
            pairs += collator.encode(sample, images)
            sizes, samples = sizes + _size(sample, images), samples + 1
            sizes += models.feature_bytes(images)
        except BadSample as bad:
            reason = reason or str(bad)
    if not pairs:
        raise UserError(f"data.train: none of the first {SAMPLES} samples can be used; the first: {reason}")
    lengths = sorted(len(pair.student.input_ids) for pair in pairs)
    return (
        pairs,
        Sequences(
            sampled=samples,
            mean=sum(lengths) / samples,
            p95=lengths[math.ceil(0.95 * len(lengths)) - 1],
            longest=lengths[-1],
            supervised=sum(len(pair.student_tokens) for pair in pairs) / samples,
            images=sum(pair.student.images for pair in pairs) / samples,
            bytes=sizes / samples,
        ),
        mixture.steps_per_epoch,
    )


def _size(sample: Conversation | Document, images: Sequence[Image.Image]) -> float:
    """Bytes of a sample where it is stored, about: its text, and its images' files."""
    if isinstance(sample, Document):
        return len(sample.text.encode())
    text = sum(len(p["text"].encode()) for m in sample.messages for p in m["content"] if p["type"] == "text")
    stored = 0
    for source, image in zip(sample.images, images, strict=True):
        if isinstance(source, str | Path) and Path(source).is_file():
            stored += Path(source).stat().st_size
        elif isinstance(source, bytes):
            stored += len(source)
        else:
            stored += image.width * image.height * 3
    return text + stored


def _assumed(models: Models) -> tuple[list[Pair], Sequences, float]:
    """A row of the greatest length with one image, the second half of its text supervised."""
    length = models.config.data.max_length

    def filled(processor: Processor) -> Encoded:
        row = processor.dummy()
        missing = length - len(row.input_ids)
        if missing < 2:
            raise UserError(f"data.max_length: {length} tokens have no room for text after {len(row.input_ids)} others")
        full = processor.answered(row, [models.student.pad_token] * missing)
        return replace(full, supervised=torch.arange(length) >= length - missing // 2)

    own, other = models.processors
    student, teacher = filled(own), None if other is None else filled(other)
    tokens = student.supervised.nonzero().flatten()
    others = tokens if teacher is None else teacher.supervised.nonzero().flatten()
    count = min(len(tokens), len(others))
    pair = Pair(student, teacher, tokens[-count:], others[-count:], torch.ones(count, dtype=torch.bool))
    return [pair], Sequences(0, length, length, length, count, student.images, 0.0), 1.0
