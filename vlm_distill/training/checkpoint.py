"""A run's checkpoints: written aside and renamed when whole, the latest found by itself, the oldest removed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"step_(\d+)$")


def completed(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a folder, ``(steps finished, path)``, oldest first."""
    if not folder.is_dir():
        return []
    found = ((_NAME.match(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def save(
    folder: Path, step: int, write: Callable[[Path], None], *, keep: int, first: bool, barrier: Callable[[], None]
) -> None:
    """Writes a checkpoint so that a crash at any moment leaves either all of it or none.

    Args:
        folder: the run's ``checkpoints``.
        step: optimizer steps finished.
        write: fills a folder; called on every rank.
        keep: how many checkpoints stay.
        first: whether this rank renames and removes.
        barrier: waits for all ranks.
    """
    unfinished = folder / f"step_{step}.unfinished"
    if first:
        for leftover in folder.glob("*.unfinished") if folder.is_dir() else ():
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
    barrier()
    write(unfinished)
    barrier()
    if first:
        for path in unfinished.rglob("*"):
            if path.is_file():
                _flush(path)
        final = folder / f"step_{step}"
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        _flush(folder)
        for _, old in completed(folder)[:-keep]:
            # Renamed first: a half-removed folder must not pass for a checkpoint.
            doomed = old.with_suffix(".unfinished")
            old.rename(doomed)
            shutil.rmtree(doomed)
    barrier()


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
