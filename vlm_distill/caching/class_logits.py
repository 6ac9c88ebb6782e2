"""Class-logit records: a teacher's logits of fixed views of images, so that later epochs run no teacher."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.errors import UserError

from .record_files import RecordArrays
from .store import ABOUT, check_room, compare, make_folder, read_about

FORMAT = 1
WHAT = "the teacher's logits"


class LogitCache:
    """Logits by sample and view, in memory-mapped files that all ranks share. Vision training itself fills it.

    The files are ``cache.json`` (the identity), ``logits.npy`` (float32 ``[samples · views, categories]``),
    ``checks.npy`` (uint32 ``[samples · views, 2]``: CRC-32 of the view, and of view and logits together) and
    ``written.npy`` (bool ``[samples · views]``). An image takes ``views · (4 · categories + 9)`` bytes: with one view
    and the 1,000 classes of ImageNet 4,009, or 5.1 GB for its 1.28 million images.

    Several processes may read and write at once. A record is written logits first, flag last, and counts only while
    its second check matches, so a record that a crash left incomplete, or that is being written, counts as missing.
    The same goes for neighbouring records that hosts overwrite for each other on a network file system.

    Args:
        folder: where the files are, or will be.
        sources: the number of samples of each of the data's sources, in the order in which samples are numbered.
        views: fixed views of each image.
        categories: C, the teacher's number of classes.
        identity: everything else that determines the logits, each a short text: a fingerprint of the teacher's
            weights, the settings of the views, seed, dtype.

    Attributes:
        samples: number of images, of all sources.

    Raises:
        UserError: the folder holds other logits or broken files, or the disk is too small.
    """

    def __init__(
        self, folder: Path, sources: Mapping[str, int], views: int, categories: int, identity: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.sources = dict(sources)
        self.samples = sum(self.sources.values())
        self.views = views
        self.categories = categories
        identity = {
            **identity,
            "sources": ", ".join(f"{name} ({samples} rows)" for name, samples in self.sources.items()),
            "views": str(views),
            "categories": str(categories),
            "format": str(FORMAT),
        }
        cells = self.samples * views
        layout: dict[str, tuple[tuple[int, ...], type]] = {
            "logits": ((cells, categories), np.float32),
            "checks": ((cells, 2), np.uint32),
            "written": ((cells,), np.bool_),
        }
        if not (folder / ABOUT).exists():
            needed = cells * (4 * categories + 9)
            check_room(folder, WHAT, needed, "lower the number of fixed views")
            changing = {f"{name}.npy" for name in layout}
            make_folder(folder, WHAT, identity, lambda made: RecordArrays.create(made, layout), changing)
        compare(folder, "logits", read_about(folder), identity)
        arrays = RecordArrays(folder, layout)
        self._logits, self._checks, self._written = arrays["logits"], arrays["checks"], arrays["written"]

    def read(self, samples: Tensor, view: int, checks: Tensor) -> Tensor | None:
        """Return the logits of some samples if all of them are stored.

        Args:
            samples: int64 ``[N]``, numbered through all sources.
            view: which fixed view, from 0.
            checks: int64 ``[N]``, CRC-32 of the present views.

        Returns:
            float32 ``[N, C]`` on the CPU, or ``None`` if one is missing.

        Raises:
            UserError: a view has changed since its logits were stored.
        """
        cells = samples.cpu().numpy() * self.views + view
        if not self._written[cells].all():
            return None
        logits, sums = self._logits[cells], self._checks[cells]
        for values, (seen, sealed) in zip(logits, sums.tolist(), strict=True):
            if zlib.crc32(values.data, seen) != sealed:
                return None
        for sample, now, (seen, _) in zip(samples.tolist(), checks.tolist(), sums.tolist(), strict=True):
            if now != seen:
                raise UserError(
                    f"{self._name(sample)}, view {view}: not the pixels whose logits {self.folder} holds: the image, "
                    "or a library that decodes or augments it, has changed since; delete that folder to fill it again"
                )
        return torch.from_numpy(logits)

    def write(self, samples: Tensor, view: int, checks: Tensor, logits: Tensor) -> None:
        """Store the logits of some samples.

        Args:
            samples: int64 ``[N]``, numbered through all sources.
            view: which fixed view, from 0.
            checks: int64 ``[N]``, CRC-32 of the views.
            logits: floating point ``[N, C]``, on any device; stored as float32.
        """
        cells = samples.cpu().numpy() * self.views + view
        values = logits.detach().float().cpu().contiguous().numpy()
        seen = checks.tolist()
        sealed = [zlib.crc32(v.data, check) for v, check in zip(values, seen, strict=True)]
        self._logits[cells] = values
        self._checks[cells] = np.array([seen, sealed], np.uint32).T
        self._written[cells] = True

    def _name(self, sample: int) -> str:
        """Return a sample's name in messages."""
        ends = list(accumulate(self.sources.values()))
        number = bisect_right(ends, sample)
        name, count = list(self.sources.items())[number]
        return f"{name}, sample {sample - ends[number] + count + 1}"
