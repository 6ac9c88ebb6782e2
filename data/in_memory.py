"""Samples that a Python program has in memory, in place of a file: lists of records, and data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .huggingface import HuggingFaceSource, characters_in
from .sources import Source

#: How the names of things in memory begin, where a configuration has a path.
PREFIX = "memory:"
_held: dict[str, Any] = {}


@contextmanager
def samples_in_memory(samples: Mapping[str, Any]) -> Iterator[None]:
    """Context manager: inside it, :func:`~data.opening.open_source` opens these samples by their names.

    Args:
        samples: by names that begin with :data:`PREFIX`, each a list of records in any layout that files may have, with
            Pillow images where they like, or a ``datasets.Dataset``.
    """
    _held.update(samples)
    try:
        yield
    finally:
        for name in samples:
            _held.pop(name, None)


def held_samples(name: str) -> Any:
    """Return the samples of a name; ``None`` for a path. Raise ``UserError`` if their program is gone."""
    if name in _held or not name.startswith(PREFIX):
        return _held.get(name)
    raise UserError(
        f"{name}: these samples were in the memory of the Python program that began the run; call "
        "vlm_distill.distill there again, or save them, and name the file"
    )


def open_held(samples: Any, name: str, images: Path, **shared: Any) -> Source:
    """Return a source of samples in memory; arguments as in :func:`~data.opening.open_source`."""
    if isinstance(samples, Sequence):
        return RecordList(samples, name, images, **shared)
    return HuggingFaceSource(samples, name, images, **shared)


class RecordList(Source):
    """Records of a list."""

    def __init__(self, records: Sequence[Any], name: str, images: Path, **shared: Any) -> None:
        super().__init__(name, images, **shared)
        self._records = records[self.rows]

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> Any:
        return self._records[index]

    def size(self, index: int) -> int:
        return characters_in(self._records[index])
