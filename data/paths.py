"""Choose a split by its usual names, and guard against paths that would block or fill the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

#: Names of folders and files that say which split they are.
SPLITS = ("train", "training", "val", "validation", "valid", "test", "testing")
_VALIDATION = ("val", "validation", "valid")

#: The longest line of a file, and the longest record of a table. Anything longer is damaged and would fill the memory.
MAX_LINE = 256 << 20
#: The largest file that is read at once: JSON, and compressed files after decompression.
MAX_WHOLE = 4 << 30


def choose_split(given: str, split: str | None, splits: Sequence[str]) -> str:
    """Return the requested split, or the only one. The usual names of a validation split are interchangeable.

    Raises:
        UserError: there is no such split, or there are several and none was requested.
    """
    if split in _VALIDATION and split not in splits:
        split = next((other for other in _VALIDATION if other in splits), split)
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        problem = "has several splits" if split is None else f"has no split {split!r}"
        raise UserError(f"{given} {problem}; set `split` to one of {', '.join(splits)}")
    return split


def folder_of(path: Path) -> Path:
    """Return the folder that relative image paths start from by default: the path, or the folder of a file."""
    if path.is_dir():
        return path
    return path.parent if path.exists() else Path()


def check_regular(path: Path) -> None:
    """Raise ``UserError`` for a pipe, which would block forever, or a device, which would never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder, but a pipe or a device; copy what it gives to a file")


def bounded_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file. Raise ``UserError`` at a line longer than :data:`MAX_LINE`."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise UserError(
                f"line {number} of {path} is longer than {MAX_LINE >> 20} MiB; the file is damaged or of another format"
            )
        yield line
