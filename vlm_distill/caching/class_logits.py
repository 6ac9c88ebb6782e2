"""A teacher's logits of fixed views of images, on disk, so that later epochs need no forward of the teacher."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from data.errors import UserError

from .store import ABOUT, check_room, compare, make_folder, read_about

FORMAT = 1


class TeacherCache:
    """Logits by row and view, in memory-mapped files that all ranks share.

    The files are ``cache.json`` (what the logits are of), ``logits.npy`` (float32 ``[rows · views, categories]``),
    ``checks.npy`` (uint32 ``[rows · views, 2]``: CRC-32 of the view, and of view and logits together) and
    ``written.npy`` (bool ``[rows · views]``). An image takes ``views · (4 · categories + 9)`` bytes: with one view and
    the 1,000 classes of ImageNet 4,009, which is 5.1 GB for its 1.28 million images.

    Several processes may read and write at once. A row is written logits first, flag last, and counts only while its
    second check fits: what a crash left half written, or another process is about to write, is not there yet. Hosts
    that share a network file system may overwrite one another's neighbouring rows: those too are then not there.

    Args:
        folder: where the files are, or will be.
        sources: names of the data's sources and their numbers of rows, in the order in which rows are numbered through.
        views: fixed views of each image.
        categories: C, the teacher's number of classes.
        identity: everything else that decides the logits, each a short text: a fingerprint of the teacher's weights,
            the settings of the views, seed, dtype.

    Attributes:
        rows: number of images, of all sources.

    Raises:
        UserError: the folder holds logits of something else, or broken files, or there is no room for it.
    """

    def __init__(
        self, folder: Path, sources: Mapping[str, int], views: int, categories: int, identity: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.sources = dict(sources)
        self.rows = sum(self.sources.values())
        self.views = views
        self.categories = categories
        identity = {
            **identity,
            "sources": ", ".join(f"{name} ({rows} rows)" for name, rows in self.sources.items()),
            "views": str(views),
            "categories": str(categories),
            "format": str(FORMAT),
        }
        cells = self.rows * views
        self._layout: dict[str, tuple[tuple[int, ...], type]] = {
            "logits": ((cells, categories), np.float32),
            "checks": ((cells, 2), np.uint32),
            "written": ((cells,), np.bool_),
        }
        if not (folder / ABOUT).exists():
            needed = cells * (4 * categories + 9)
            check_room(folder, "the teacher's logits", needed, "lower the number of fixed views")
            changing = {f"{name}.npy" for name in self._layout}
            make_folder(folder, "the teacher's logits", identity, self._fill, changing)
        compare(folder, "logits", read_about(folder), identity)
        self._logits, self._checks, self._written = (self._open(name) for name in self._layout)

    def _fill(self, folder: Path) -> None:
        for name, (shape, dtype) in self._layout.items():
            open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape).flush()

    def _open(self, name: str) -> np.memmap[Any, Any]:
        path = self.folder / f"{name}.npy"
        shape, dtype = self._layout[name]
        try:
            array = open_memmap(path, mode="r+")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}; delete the folder to fill it anew") from None
        if array.shape != shape or array.dtype != dtype:
            raise UserError(f"{path}: {array.dtype} {array.shape} is not {np.dtype(dtype)} {shape}; delete the folder")
        return array

    def read(self, rows: Tensor, view: int, checks: Tensor) -> Tensor | None:
        """The logits of some rows, if all of them are there.

        Args:
            rows: int64 ``[N]``, numbered through all sources.
            view: which fixed view, from 0.
            checks: int64 ``[N]``, CRC-32 of the views as they are now.

        Returns:
            float32 ``[N, C]`` on the CPU, or ``None`` if one is missing.

        Raises:
            UserError: a view is not the one whose logits are there.
        """
        cells = rows.cpu().numpy() * self.views + view
        if not self._written[cells].all():
            return None
        logits, sums = self._logits[cells], self._checks[cells]
        for values, (seen, sealed) in zip(logits, sums.tolist(), strict=True):
            if zlib.crc32(values.data, seen) != sealed:
                return None
        for row, now, (seen, _) in zip(rows.tolist(), checks.tolist(), sums.tolist(), strict=True):
            if now != seen:
                raise UserError(
                    f"{self._place(row)}, view {view}: not the pixels whose logits {self.folder} holds: the image, or "
                    "a library that decodes or augments it, has changed since; delete that folder to fill it anew"
                )
        return torch.from_numpy(logits)

    def write(self, rows: Tensor, view: int, checks: Tensor, logits: Tensor) -> None:
        """Keeps the logits of some rows.

        Args:
            rows: int64 ``[N]``, numbered through all sources.
            view: which fixed view, from 0.
            checks: int64 ``[N]``, CRC-32 of the views.
            logits: floating point ``[N, C]``, on any device; kept as float32.
        """
        cells = rows.cpu().numpy() * self.views + view
        values = logits.detach().float().cpu().contiguous().numpy()
        seen = checks.tolist()
        sealed = [zlib.crc32(v.data, check) for v, check in zip(values, seen, strict=True)]
        self._logits[cells] = values
        self._checks[cells] = np.array([seen, sealed], np.uint32).T
        self._written[cells] = True

    def _place(self, row: int) -> str:
        ends = list(accumulate(self.sources.values()))
        source = bisect_right(ends, row)
        return f"{list(self.sources)[source]}, row {row - ends[source] + list(self.sources.values())[source] + 1}"
