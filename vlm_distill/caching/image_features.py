"""Image-feature records: a frozen vision encoder's features, so that epochs do not compute them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import UserError

from .record_files import RecordFiles, RecordWriter
from .sample_digests import image_digest
from .store import read_about

FORMAT = 2
_SHAPE = {"format": int | str}
_ENTRY = np.dtype([("images", "<u8"), ("offset", "<i8"), ("tokens", "<i4"), ("check", "<u4")])


class FeatureCache:
    """Features ``[tokens, width]``, found by the decoded pixels of their images: one record, whatever the samples.

    The files are those of :class:`~vlm_distill.caching.record_files.RecordFiles`; a record's data are its features.

    Args:
        folder: of a cache.

    Attributes:
        about: the content of ``cache.json``.
        width, dtype: of the features.

    Raises:
        UserError: there is no cache, or one of another kind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = read_about(folder, _SHAPE)
        if self.about["format"] != f"vision features {FORMAT}":
            raise UserError(f"{folder}: no cache of vision features of this version; name another folder")
        self.width, self.dtype = int(self.about["width"]), getattr(torch, self.about["dtype"])
        self._files = RecordFiles(folder, _ENTRY, self._sizes)
        self._order = np.argsort(self._files.entries["images"], kind="stable")
        self._images = self._files.entries["images"][self._order]

    @staticmethod
    def describe(width: int, dtype: torch.dtype) -> dict[str, Any]:
        """Return the part of ``cache.json`` that this class reads."""
        return {"format": f"vision features {FORMAT}", "width": width, "dtype": str(dtype).removeprefix("torch.")}

    @property
    def bytes_a_token(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The bytes of all features."""
        return int(self._sizes(self._files.entries).sum())

    def _sizes(self, entries: Any) -> Any:
        return entries["tokens"].astype(np.int64) * self.bytes_a_token

    def __len__(self) -> int:
        """Return the number of different images, or sets of images that were encoded together."""
        return len(np.unique(self._images))

    def _find(self, digest: int) -> int | None:
        """Return the number of an entry."""
        at = int(np.searchsorted(self._images, np.uint64(digest)))
        found = at < len(self._images) and int(self._images[at]) == digest
        return int(self._order[at]) if found else None

    def __contains__(self, digest: int) -> bool:
        return self._find(digest) is not None

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the features ``[tokens, width]`` of images that were encoded together.

        Raises:
            UserError: they are missing or damaged.
        """
        number = self._find(image_digest(images))
        if number is None:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise UserError(
                f"student.vision_cache: {self.folder} has no features of images of {sizes} pixels: the data have "
                "changed, or the cache is incomplete; run vlm-distill cache to fill it"
            )
        data = self._files.checked(number)
        return torch.from_numpy(np.array(data)).view(self.dtype).view(-1, self.width)


class FeatureWriter:
    """Writes one process's part of a cache of features. Call ``close``, or the last records are lost."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache, self._records = cache, RecordWriter(cache.folder, _ENTRY)

    def write(self, digest: int, features: Tensor) -> None:
        """Write the features ``[tokens, width]`` of the images with this digest."""
        data = features.to("cpu", self._cache.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        self._records.append(data, images=digest, tokens=len(features))

    def close(self) -> None:
        self._records.close()
