"""A run's checkpoints: written aside and renamed when whole, the latest found by itself, the oldest removed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.errors import UserError

_NAME = re.compile(r"step_(\d+)$")


def completed(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a folder, ``(steps finished, path)``, oldest first."""
    if not folder.is_dir():
        return []
    _refuse_links(folder)
    found = ((_NAME.match(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def _refuse_links(folder: Path) -> None:
    """Checkpoints are pickles, which run as code when they are loaded: a run takes none but its own."""
    run = folder.parent.resolve()
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(run):
            raise UserError(f"{path}: leads out of the run's folder; a run resumes from its own checkpoints alone")


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


def best_score(folder: Path, compared_by: Mapping[str, Any], done: int) -> float | None:
    """The score of the best student so far, ``None`` where none is kept.

    Args:
        folder: the run's ``best``.
        compared_by: scores of anything else do not count.
        done: steps finished; what a run found after them it finds again.
    """
    path = folder / "best.json"
    if not path.is_file():
        return None
    about = json.loads(path.read_text("utf-8"))
    same = all(about.get(key) == value for key, value in compared_by.items())
    return about["score"] if same and about["step"] <= done else None


def save_best(folder: Path, write: Callable[[Path], None], about: Mapping[str, Any]) -> None:
    """Puts a student in the place of the best one before; one rank calls this.

    A crash may leave none, but never half of one: the evaluation is repeated then, because its checkpoint comes after.

    Args:
        folder: the run's ``best``.
        write: fills a folder with the student.
        about: what ``best.json`` says.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    (unfinished / "best.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    for path in unfinished.rglob("*"):
        if path.is_file():
            _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
