"""A run's checkpoints: written aside and renamed when whole, the latest found by itself, the oldest removed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.errors import UserError

from . import faults
from .output import cause_of, flush, flush_all, put_in_place, size

_NAME = re.compile(r"step_(\d+)$")


def completed(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a folder, ``(steps finished, path)``, oldest first."""
    if not folder.is_dir():
        return []
    found = ((_NAME.match(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def to_read(folder: Path) -> Path | None:
    """The latest whole checkpoint, ``None`` without one.

    Raises:
        UserError: it is not the run's own. Checkpoints are pickles, which run as code when they are loaded.
    """
    whole = completed(folder)
    if not whole:
        return None
    latest, run = whole[-1][1], folder.parent.resolve()
    for path in (folder, latest, *latest.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(run):
            raise UserError(f"{path}: leads out of the run's folder; a run resumes from its own checkpoints alone")
    return latest


def clear(folder: Path) -> None:
    """Removes what a crash has left half-written or half-removed; one rank calls this."""
    for leftover in folder.glob("*.unfinished"):
        shutil.rmtree(leftover)


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int,
    first: bool,
    gather: Callable[[str | None], list[str | None]],
) -> None:
    """Writes a checkpoint so that a crash at any moment leaves either all of it or none.

    Args:
        folder: the run's ``checkpoints``.
        step: optimizer steps finished.
        write: fills a folder; called on every rank.
        keep: how many checkpoints stay.
        first: whether this rank renames and removes.
        gather: every rank's text on every rank; each waits for all.

    Raises:
        UserError: a rank could not write, for example on a full disk; on all ranks, the earlier checkpoints untouched.
    """
    unfinished, final = folder / f"step_{step}.unfinished", folder / f"step_{step}"

    def begin() -> None:
        clear(folder)
        unfinished.mkdir(parents=True)
        faults.point("checkpoint.begin")

    def finish() -> None:
        flush_all(unfinished)
        if final.exists():
            shutil.rmtree(final)
        faults.point("checkpoint.rename")
        unfinished.rename(final)
        flush(folder)
        for _, old in completed(folder)[:-keep]:
            # Renamed first: a half-removed folder must not pass for a checkpoint.
            doomed = old.with_suffix(".unfinished")
            old.rename(doomed)
            faults.point("checkpoint.prune")
            shutil.rmtree(doomed)

    for action, takes_part in ((begin, first), (lambda: write(unfinished), True), (finish, first)):
        error, reason = None, None
        try:
            if takes_part:
                action()
        except (OSError, RuntimeError) as raised:  # PyTorch makes the one into the other
            error, reason = raised, cause_of(raised, folder) or str(raised)
        reasons = [text for text in gather(reason) if text is not None]
        if not reasons:
            continue
        if error is not None and cause_of(error, folder) is None:
            raise error
        whole = completed(folder)
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        needed = f" (the one before took {size(whole[-1][1]):,} bytes)" if whole else ""
        again = f"step {whole[-1][0]}" if whole else "its beginning"
        raise UserError(
            f"the checkpoint of step {step} could not be written{needed}: {reasons[0]}; "
            f"mend that and start the run again, which goes on from {again}"
        )


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

    A crash may leave none, but never half of one: the evaluation, which follows its checkpoint, is repeated then.

    Args:
        folder: the run's ``best``.
        write: fills a folder with the student.
        about: what ``best.json`` says.
    """

    def write_both(unfinished: Path) -> None:
        write(unfinished)
        (unfinished / "best.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")

    put_in_place(folder, write_both, "best")
