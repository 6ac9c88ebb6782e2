"""Deal labelled images to one rank as whole optimizer steps; views do not depend on ranks and workers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import Problem, SampleId, Step
from data.conversation import ImageSource
from data.errors import BadSample, UserError
from data.images import load_image
from data.loader import StepSplit, describe_samples, problem_of
from data.mixture import Mixture

from .augmentation import Augmentation
from .inputs import InputSettings
from .transforms import build_transform, kept_randomness, seed_randomness

if TYPE_CHECKING:
    from data.classification import LabelledImages


_FREE, _FIXED = 0, 1


@dataclass
class ImageBatch:
    """A micro-batch of V views of N images, the first views of all images first.

    Attributes:
        images: uint8 ``[V·N, 3, H, W]`` of the student's size, in the memory format ``channels_last``.
        labels: int64 ``[N]``, in the student's order of classes.
        rows: int64 ``[N]``, the images' numbers, counted through all sources.
        checks: int64 ``[V·N]``, CRC-32 of each view's pixels; empty unless requested.
        number: the micro-batch's number in the step, over all ranks; with seed and step it seeds the device's draws.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    checks: Tensor
    number: int = 0

    @property
    def samples(self) -> int:
        """N, the number of readable images."""
        return len(self.labels)

    def filled(self, views: int) -> ImageBatch:
        """Return this micro-batch; if it is empty, V views of a black and a white image of class 0 instead.

        Every rank must run every module, and batch norm needs two images.
        """
        if self.samples:
            return self
        pixels = torch.zeros(views, 2, *self.images.shape[1:], dtype=torch.uint8, device=self.images.device)
        pixels[:, 1] = 255
        nothing = self.labels.new_zeros(2)
        return replace(self, images=pixels.flatten(0, 1), labels=nothing, rows=nothing, checks=nothing.repeat(views))

    def to(self, device: torch.device | str) -> ImageBatch:
        return self._map(lambda x: x.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> ImageBatch:
        return ImageBatch(change(self.images), change(self.labels), change(self.rows), change(self.checks), self.number)


@dataclass(frozen=True)
class ViewSettings:
    """How training sees an image.

    Attributes:
        augmentations: one per view, such as a weak and a strong one; ``None`` is the view of evaluation.
        fixed_views: number of different views of an image, shown in turn by epoch, so that a teacher's logits can be
            cached; 0 for a new one each time.
        repeats: how often each image occurs in its step, in different views (repeated augmentation: Hoffer et al. 2020,
            Berman et al. 2019). An epoch keeps its number of steps, and so shows one image in ``repeats``, others in
            each epoch. Repeats are far from each other, on different ranks where possible.
        checks: compute a checksum of each view.
    """

    augmentations: Sequence[Augmentation | None] = (None,)
    fixed_views: int = 0
    repeats: int = 1
    checks: bool = False


class ImageSteps(Dataset[Step]):
    """One rank's share of each optimizer step, by the step's number; micro-batches are dealt as in ``StepDataset``.

    Each view's randomness is seeded by (seed, step, position in the step, view), or for fixed views by (seed, epoch
    modulo ``fixed_views``, image, view), so that any rank and any worker makes the same view.

    Args:
        mixture: the order of images of ``LabelledImages``; its seed also seeds the views.
        inputs: the student's input.
        views: how training sees an image.
        label_maps: for each source ``None`` (its labels are the student's), or the student's class of each of its
            labels, −1 for a class that the student does not have: such an image is a bad sample.
        split: this rank's share of a step.
        load: decodes an image.
        on_bad: ``skip`` leaves the micro-batch of a bad sample smaller, ``fail`` ends the training.

    Attributes:
        steps_per_epoch: steps of an epoch, including a smaller last one.

    Raises:
        UserError: split or ``repeats`` do not fit the mixture's batch size, or both repeats and fixed views are given;
            on access, with ``fail``, a bad sample.
    """

    def __init__(
        self,
        mixture: Mixture[LabelledImages],
        inputs: InputSettings,
        views: ViewSettings = ViewSettings(),
        label_maps: Sequence[Sequence[int] | None] | None = None,
        *,
        split: StepSplit,
        load: Callable[[ImageSource], Image.Image] = load_image,
        on_bad: Literal["skip", "fail"] = "skip",
    ) -> None:
        split.check(mixture.batch_size)
        if mixture.batch_size % views.repeats:
            raise UserError(
                f"batch size {mixture.batch_size} is not a multiple of {views.repeats} repeats; change one of them"
            )
        if views.fixed_views and views.repeats > 1:
            raise UserError(
                f"{views.fixed_views} fixed views and {views.repeats} repeats: set one, as repeats need new views"
            )
        self.mixture = mixture
        self.size = inputs.size
        self.transforms = [build_transform(inputs, augmentation) for augmentation in views.augmentations]
        self.label_maps = [None] * len(mixture.sources) if label_maps is None else list(label_maps)
        self.split = split
        self.load = load
        self.on_bad = on_bad
        self.views = views
        self.steps_per_epoch = mixture.steps_per_epoch
        #: Each source's first row when rows are numbered through all sources.
        self._first = [0, *accumulate(len(source) for source in mixture.sources)]

    def __getitem__(self, index: int) -> Step:
        rows = self._rows(index)
        problems: list[Problem] = []
        numbers = range(self.split.rank, self.split.accumulation * self.split.world, self.split.world)
        with kept_randomness():
            batches: list[Any] = [self._batch(index, rows, number, problems) for number in numbers]
        readable = sum(batch.samples for batch in batches)
        return Step(index, batches, problems, consumed=readable + len(problems))

    def locate_samples(self, index: int, number: int) -> str:
        """Describe where the images of this rank's micro-batch ``number`` of a step come from."""
        return describe_samples(self.mixture.sources, self.split.micro_batch(self._rows(index), number))

    def sample(self, count: int) -> ImageBatch:
        """Return the readable ones of the first ``count`` images of the training."""
        with kept_randomness():
            return self._batch(0, self._rows(0)[:count], 0, [])

    def try_sample(self, sample_id: SampleId) -> tuple[int, int]:
        """Make a sample's views, as training does. Return one image and no answer, as ``StepDataset.try_sample``."""
        with kept_randomness():
            self._read(0, 0, *sample_id)
        return 1, 0

    def turn(self, step: int) -> int:
        """Return which of the fixed views a step shows, from 0."""
        return step // self.steps_per_epoch % self.views.fixed_views

    def _rows(self, step: int) -> list[tuple[int, int]]:
        """Return the (source, row) pairs of a step, over all ranks."""
        rows = self.mixture.samples_of(step)
        chosen = rows[: math.ceil(len(rows) / self.views.repeats)]
        return (chosen * self.views.repeats)[: len(rows)]

    def _batch(self, step: int, places: Sequence[tuple[int, int]], number: int, problems: list[Problem]) -> ImageBatch:
        """Make micro-batch ``number`` of a step whose (source, row) pairs are ``places``."""
        labels, rows, images = [], [], []
        size = self.split.micro_batch_size
        start = number * size
        for place, (source, row) in enumerate(places[start : start + size], start):
            try:
                label, views = self._read(step, place, source, row)
            except BadSample as bad:
                problems.append(problem_of(self.mixture.sources[source], row, bad, self.on_bad))
                continue
            labels.append(label)
            rows.append(self._first[source] + row)
            images.append(views)
        count = len(self.transforms)
        # A view is the transpose of Pillow's pixels: in this memory format it is copied without reordering.
        pixels = torch.empty((count * len(rows), 3, *self.size), dtype=torch.uint8, memory_format=torch.channels_last)
        for i, views in enumerate(images):
            for view, pixels_of_view in enumerate(views):
                pixels[view * len(rows) + i] = pixels_of_view
        checks = [zlib.crc32(view.permute(1, 2, 0).numpy().data) for view in pixels] if self.views.checks else []
        return ImageBatch(
            pixels,
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(checks, dtype=torch.int64),
            number,
        )

    def _read(self, step: int, place: int, source: int, row: int) -> tuple[int, list[Tensor]]:
        origin = self.mixture.sources[source]
        sample = origin[row]
        label, mapping = sample.label, self.label_maps[source]
        if mapping is not None:
            label = mapping[label]
            if label < 0:
                raise BadSample("class the student does not have", str(origin.classes[sample.label]))
        image = self.load(sample.image)
        views = []
        for view, transform in enumerate(self.transforms):
            if self.views.fixed_views:
                seed_randomness(self.mixture.seed, _FIXED, self.turn(step), self._first[source] + row, view)
            else:
                # Not by epoch and row: an epoch, and even a step, may repeat a row.
                seed_randomness(self.mixture.seed, _FREE, step, place, view)
            views.append(transform(image))
        return label, views
