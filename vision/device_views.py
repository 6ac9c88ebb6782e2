"""Normalise, erase and mix micro-batches on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from .augmentation import Erasing, Mixing
from .inputs import InputSettings
from .loader import ImageBatch
from .transforms import kept_randomness, seed_randomness


class Views(NamedTuple):
    """A micro-batch as the models receive it; V views of N images, the first views of all images first.

    Attributes:
        student: floating point ``[V·N, 3, H, W]``, normalised for the student.
        teacher: the same pixels ``[V·N, 3, H', W']``, normalised for the teacher; ``None`` without one.
        labels: int64 ``[N]``; for a mixed image the label with the larger share, its own if shares are equal.
        soft: float32 ``[N, C]``, the shares of the labels; ``None`` if images are not mixed.
    """

    student: Tensor
    teacher: Tensor | None
    labels: Tensor
    soft: Tensor | None


class DeviceViews:
    """Normalises, erases and mixes a micro-batch on the device, and shows the teacher the same pixels.

    Random draws depend on seed, step and the micro-batch's number alone: they are the same for any split over ranks.
    The views of an image share a label, and so are mixed with the same partner, share and box. Images are paired within
    their micro-batch; the last of an odd number stays unmixed.

    Args:
        student: the student's input.
        teacher: the teacher's input; ``None`` without a teacher.
        classes: C, the student's number of classes.
        erasing: random erasing; ``None`` for none. Each view loses its own rectangles.
        mixing: Mixup and CutMix; ``None`` for neither.
        device: where the batches are.
        dtype: the images' dtype; everything is computed in float32.
        channels_last: the memory format of the images.
    """

    def __init__(
        self,
        student: InputSettings,
        teacher: InputSettings | None,
        classes: int,
        *,
        erasing: Erasing | None = None,
        mixing: Mixing | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.classes = classes
        self.teacher = teacher
        self._student_scale, self._student_shift = self._affine((0.0,) * 3, (1 / 255,) * 3, student.mean, student.std)
        self._teacher_size: tuple[int, int] | None = None
        self._teacher_norm: tuple[Tensor, Tensor] | None = None
        if teacher is not None:
            if teacher.size != student.size:
                self._teacher_size = teacher.size
            if (teacher.mean, teacher.std) != (student.mean, student.std):
                self._teacher_norm = self._affine(student.mean, student.std, teacher.mean, teacher.std)
        self._erase: RandomErasing | None = None
        if erasing is not None and erasing.probability:
            self._erase = RandomErasing(
                erasing.probability, mode=erasing.mode, max_count=erasing.count, device=self.device
            )
        self._mix: Mixup | None = None
        if mixing is not None and (mixing.mixup or mixing.cutmix):
            self._mix = Mixup(
                mixup_alpha=mixing.mixup,
                cutmix_alpha=mixing.cutmix,
                prob=mixing.probability,
                switch_prob=mixing.switch,
                mode=mixing.mode,
                label_smoothing=0.0,
                num_classes=classes,
            )

    def __call__(self, batch: ImageBatch, *, seed: int, step: int) -> Views:
        """Make the views of a micro-batch that is on the device.

        Args:
            batch: the micro-batch.
            seed: the training's seed.
            step: the optimizer step, counted from 0 through all epochs.
        """
        images = batch.images.to(torch.float32, memory_format=self.format)
        images.mul_(self._student_scale).add_(self._student_shift)
        labels, soft = batch.labels, None
        if self._erase is not None or self._mix is not None:
            with kept_randomness(self.device):
                if self._erase is not None:
                    seed_randomness(seed, step, batch.number, 0, device=self.device)
                    self._erase(images)
                if self._mix is not None:
                    labels, soft = self._mixed(images, batch.labels, (seed, step, batch.number, 1))
        shown = images.to(self.dtype)
        return Views(shown, self._for_teacher(images, shown), labels, soft)

    def _mixed(self, images: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mix images ``[V·N, 3, H, W]`` in place; return the labels of larger shares, and the shares ``[N, C]``."""
        assert self._mix is not None
        soft = torch.nn.functional.one_hot(labels, self.classes).float()
        even = len(labels) // 2 * 2
        if even:
            for view in images.chunk(len(images) // len(labels)):
                # Seed again, so that each view draws the same numbers.
                seed_randomness(*key, device=self.device)
                _, soft[:even] = self._mix(view[:even], labels[:even])
        own = soft.gather(1, labels[:, None])[:, 0]
        return torch.where(own >= 0.5, labels, soft.argmax(1)), soft

    def _for_teacher(self, images: Tensor, shown: Tensor) -> Tensor | None:
        """Return the teacher's images, from the student's in float32 or as ``shown`` to the student."""
        if self.teacher is None:
            return None
        if self._teacher_size is None and self._teacher_norm is None:
            return shown
        if self._teacher_size is not None:
            # Interpolation weights sum to one, so normalisation may be changed afterwards.
            images = (
                torch.nn.functional.interpolate(images, self._teacher_size, mode="bicubic", antialias=True)
                if len(images)
                else images.new_empty(0, 3, *self._teacher_size)
            )
        if self._teacher_norm is not None:
            scale, shift = self._teacher_norm
            images = torch.addcmul(shift, images, scale)
        return images.to(self.dtype)

    def _affine(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        new_mean: tuple[float, ...],
        new_std: tuple[float, ...],
    ) -> tuple[Tensor, Tensor]:
        """Return scale and shift, float32 ``[3, 1, 1]``, from one normalisation to another: ``x · scale + shift``."""
        a, b, c, d = (torch.tensor(x, dtype=torch.float64).reshape(3, 1, 1) for x in (mean, std, new_mean, new_std))
        return (b / d).float().to(self.device), ((a - c) / d).float().to(self.device)
