"""The cache of a frozen vision encoder's features: filled by ``vlm-distill cache``, read in place of running it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import Step
from data.cache_folder import ABOUT, compare, fingerprint, make_folder, read_about
from data.conversation import Document
from data.errors import BadSample, UserError
from data.feature_cache import FeatureCache, FeatureWriter
from data.loader import make_loader
from data.sources import Source, TextSource
from data.token_cache import image_digest
from vlm_distill.config import RunConfig
from vlm_distill.launch import cores
from vlm_distill.models.common import DTYPES
from vlm_distill.models.composed import ComposedProcessor, ComposedVLM
from vlm_distill.models.fingerprint import digest_text
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import Teacher
from vlm_distill.models.vision_encoders import ImageTransform, VisionEncoder

from .build import image_loader, load_models, open_sources
from .engine import Processes
from .teacher_cache import Told, say

WHAT = "the vision encoder's features"


def training_processors(
    config: RunConfig, student: VisionLanguageModel, teacher: Teacher | None, same_encoder: bool
) -> tuple[tuple[Any, Any], str | None]:
    """What encodes the student's and the teacher's samples, reading features where there is a cache; and words on that.

    Args:
        same_encoder: the teacher has the student's vision encoder, so that the cache is of both.

    Raises:
        UserError: there is no cache, or it is of another encoder.
    """
    own, other = student.processor, None if teacher is None else teacher.processor
    if config.student.vision_cache is None:
        return (own, other), None
    folder, encoder = Path(config.student.vision_cache), encoder_of(student)
    if not (folder / ABOUT).is_file():
        raise UserError(f"student.vision_cache: {folder} holds no cache; fill it: vlm-distill cache CONFIG")
    cache = FeatureCache(folder)
    compare(folder, "features", cache.about.get("identity", {}), _identity(config, encoder))
    assert isinstance(own, ComposedProcessor)
    if same_encoder:
        assert isinstance(other, ComposedProcessor)
        other = other.with_features(cache)
    whose = "student's and the teacher's" if same_encoder else "student's"
    told = f"the {whose} vision encoder does not run in training: {folder} holds features of {len(cache):,} images"
    return (own.with_features(cache), other), told


def encoder_of(model: VisionLanguageModel) -> VisionEncoder:
    """The vision encoder of an assembled model. Raises ``UserError`` where it is another kind of model."""
    if not isinstance(model, ComposedVLM) or model.vision_encoder is None:
        raise UserError(
            "student.vision_cache: is for models assembled from parts, with a vision encoder, whose images all have "
            "as many features; leave it out"
        )
    return model.vision_encoder


def _identity(config: RunConfig, encoder: VisionEncoder) -> dict[str, str]:
    """Everything that decides the features of an image, each a short text by its name."""
    return {
        "vision encoder": fingerprint({name: t.float() for name, t in encoder.state_dict().items()})[:16],
        "settings": digest_text(json.dumps(encoder.settings, sort_keys=True, default=str)),
        "dtype": config.training.dtype,
    }


@dataclass
class _Images:
    """A micro-batch of images: their digests, and float32 pixels ``[n, 3, H, W]``."""

    digests: list[int]
    pixels: Tensor

    def pin_memory(self) -> _Images:
        return _Images(self.digests, self.pixels.pin_memory())


class _Rows(Dataset[Step]):
    """The images of rows by number that are not in the cache yet, a micro-batch's worth of rows at a time."""

    def __init__(
        self,
        config: RunConfig,
        sources: Sequence[Source | TextSource],
        rows: Sequence[Sequence[tuple[int, int]]],
        transform: ImageTransform,
        cache: FeatureCache,
    ) -> None:
        self.sources, self.rows, self.transform, self.cache = sources, rows, transform, cache
        self.load = image_loader(config.data)

    def __getitem__(self, index: int) -> Step:
        found: dict[int, Tensor] = {}
        for source, row in self.rows[index]:
            try:
                sample = self.sources[source][row]
                images = [] if isinstance(sample, Document) else [self.load(image) for image in sample.images]
            except BadSample:  # which the training counts
                continue
            for image in images:
                digest = image_digest(image)
                if digest not in found and digest not in self.cache:
                    found[digest] = self.transform(image)
        pixels = torch.stack(list(found.values())) if found else torch.empty(0, 3, *self.transform.size)
        return Step(index, [_Images(list(found), pixels)])


def fill(config: RunConfig, processes: Processes) -> None:
    """Runs the student's vision encoder over all images of all sources that are not in its cache yet.

    Args:
        config: the run that will read them.
        processes: the ranks; every rank calls this. Each takes its share of the rows.

    Raises:
        UserError: the cache is of something else, or the student has no such encoder.
    """
    assert config.student.vision_cache is not None
    folder = Path(config.student.vision_cache)
    sources = open_sources(config.data.train, config.data.max_length)
    # Loaded as the run loads it: a student may be cut from its teacher.
    encoder = encoder_of(load_models(config, processes)[0])
    if processes.first and not (folder / ABOUT).exists():
        dtype = DTYPES[config.training.dtype]
        about = FeatureCache.describe((encoder.tokens, encoder.width), dtype)
        make_folder(folder, WHAT, {"identity": _identity(config, encoder), **about}, lambda _: None)
    processes.barrier()
    compare(folder, "features", read_about(folder).get("identity", {}), _identity(config, encoder))
    cache = FeatureCache(folder)
    encoder.to(processes.device, cache.dtype).eval()
    if processes.first:
        say(f"{folder}: {cache.bytes_an_image:,} bytes an image; {len(cache):,} images are there")
    # Nobody writes before every rank knows what is there.
    processes.barrier()
    micro = config.training.micro_batch_size or max(1, config.training.batch_size // processes.world)
    places = [(number, row) for number, source in enumerate(sources) for row in range(len(source))]
    whole = [places[i : i + micro] for i in range(0, len(places), micro)]
    # As many on every rank: one may get nothing at the end.
    rows = [*whole, *[[]] * (-len(whole) % processes.world)][processes.rank :: processes.world]
    _run(encoder, cache, _Rows(config, sources, rows, encoder.transform, cache), config, processes)
    processes.barrier()
    if processes.first:
        cache = FeatureCache(folder)
        say(f"{folder}: {len(cache):,} images in {len(cache) * cache.bytes_an_image / 1e9:.2f} GB")


@torch.no_grad()
def _run(encoder: VisionEncoder, cache: FeatureCache, dataset: _Rows, config: RunConfig, processes: Processes) -> None:
    # Rows without an image have a blank one in training.
    blank = encoder.transform.blank()
    first = [] if image_digest(blank) in cache else [_Images([image_digest(blank)], encoder.transform(blank)[None])]
    workers, count = min(config.data.workers, cores()), len(dataset.rows)
    steps = make_loader(dataset, 0, count, workers=workers, prefetch=config.data.prefetch)
    writer, told, seen = FeatureWriter(cache), Told(processes, count), set[int]()
    try:
        if processes.first:
            for images in first:
                _write(writer, encoder, images, seen, processes)
        for step in steps:
            _write(writer, encoder, step.batches[0], seen, processes)
            told(step.index + 1)
    finally:
        writer.close()


def _write(
    writer: FeatureWriter, encoder: VisionEncoder, images: _Images, seen: set[int], processes: Processes
) -> None:
    new = [i for i, digest in enumerate(images.digests) if digest not in seen]
    if new:
        features = encoder(images.pixels[new].to(processes.device)).cpu()
        for i, own in zip(new, features, strict=True):
            writer.write(images.digests[i], own)
            seen.add(images.digests[i])
