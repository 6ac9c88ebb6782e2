"""Where data lie: splits by their usual names, and paths that are no files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import UserError

#: Names of folders and files that say which split they are.
SPLITS = ("train", "training", "val", "validation", "valid", "test", "testing")
_VALIDATION = ("val", "validation", "valid")


def choose_split(given: str, split: str | None, splits: Sequence[str]) -> str:
    """The split that is meant: the only one, the named one, or for a validation split that one by another usual name.

    Raises:
        UserError: there is no such split, or several and none named.
    """
    if split in _VALIDATION and split not in splits:
        split = next((other for other in _VALIDATION if other in splits), split)
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        problem = "has several splits" if split is None else f"has no split {split!r}"
        raise UserError(f"{given} {problem}; set `split` to one of {', '.join(splits)}")
    return split


def check_regular(path: Path) -> None:
    """Raises ``UserError`` for what is there and is no file: a pipe would wait for ever, a device never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder, but a pipe or a device; copy what it gives to a file")
