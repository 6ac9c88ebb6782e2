"""A frozen vision encoder's features of images, on disk, so that a run does not compute them again in every epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .cache_folder import Shards, ShardWriter, read_about
from .errors import UserError
from .token_cache import image_digest

FORMAT = 1
_ENTRY = np.dtype([("image", "<u8"), ("offset", "<i8"), ("check", "<u4")])


class FeatureCache:
    """Features ``[tokens, width]`` by an image's decoded pixels, once for each however many samples show it.

    The files are those of :class:`~data.cache_folder.Shards`; an image's data are its features.

    Args:
        folder: of a cache.

    Attributes:
        about: what ``cache.json`` says.
        shape: tokens and width of an image's features.
        dtype: of the features.

    Raises:
        UserError: there is no cache, or one of something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = read_about(folder)
        if self.about.get("format") != f"vision features {FORMAT}":
            raise UserError(f"{folder}: no cache of vision features of this version; name another folder")
        tokens, width = self.about["shape"]
        self.shape, self.dtype = (int(tokens), int(width)), getattr(torch, self.about["dtype"])
        self._shards = Shards(folder, _ENTRY, self._sizes)
        self._order = np.argsort(self._shards.entries["image"], kind="stable")
        self._images = self._shards.entries["image"][self._order]

    @staticmethod
    def describe(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        """The part of ``cache.json`` that this class reads."""
        return {
            "format": f"vision features {FORMAT}",
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
        }

    @property
    def bytes_an_image(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def _sizes(self, entries: Any) -> Any:
        return np.full(np.shape(entries), self.bytes_an_image)

    def __len__(self) -> int:
        """Different images."""
        return len(np.unique(self._images))

    def _find(self, digest: int) -> int | None:
        """The number of an image's entry."""
        at = int(np.searchsorted(self._images, np.uint64(digest)))
        found = at < len(self._images) and int(self._images[at]) == digest
        return int(self._order[at]) if found else None

    def __contains__(self, digest: int) -> bool:
        return self._find(digest) is not None

    def __call__(self, image: Image.Image) -> Tensor:
        """The features of an image, ``[tokens, width]``.

        Raises:
            UserError: they are not there, or damaged.
        """
        number = self._find(image_digest(image))
        if number is None:
            raise UserError(
                f"student.vision_cache: {self.folder} has no features of an image of {image.width} x {image.height} "
                "pixels: the data have changed, or the cache is not whole; run vlm-distill cache to fill it"
            )
        data = self._shards.checked(number)
        return torch.from_numpy(np.array(data)).view(self.dtype).view(self.shape)


class FeatureWriter:
    """One process's part of a cache of features; ``close`` it."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache, self._shard = cache, ShardWriter(cache.folder, _ENTRY)

    def write(self, digest: int, features: Tensor) -> None:
        """Keeps an image's features ``[tokens, width]``."""
        data = features.to("cpu", self._cache.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        self._shard.append(data, image=digest)

    def close(self) -> None:
        self._shard.close()
