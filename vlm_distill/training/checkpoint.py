"""A run's checkpoints: written aside, renamed when complete, checked against their manifests, pruned."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data.errors import UserError
from data.saved_json import read_object
from vlm_distill.runtime import faults, manifest
from vlm_distill.runtime.manifest import Entry
from vlm_distill.runtime.output import cause_of, flush, flush_all, put_in_place, size

T = TypeVar("T")

_NAME = re.compile(r"step_(\d+)$")


def completed(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder as ``(steps finished, path)``, oldest first; some may be damaged."""
    if not folder.is_dir():
        return []
    found = ((_NAME.match(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def steps_of(path: Path) -> int:
    """Return the number of steps that the checkpoint at this path has finished."""
    match = _NAME.match(path.name)
    assert match is not None
    return int(match[1])


@dataclass(frozen=True)
class Found:
    """The newest intact checkpoint.

    Attributes:
        path: its folder.
        damaged: newer, damaged ones, and what is wrong with each.
    """

    path: Path
    damaged: Mapping[Path, str]


def _alone(item: T) -> list[T]:
    return [item]


def find(folder: Path, *, rank: int = 0, world: int = 1, gather: Callable[[Any], list[Any]] = _alone) -> Found | None:
    """Return the newest intact checkpoint, or ``None`` if there is no checkpoint at all. Collective.

    Every file is compared with the manifest, each rank reading its share. The first rank lists the checkpoints, and all
    ranks return the same answer.

    Args:
        folder: a run's ``checkpoints``.
        rank, world: this rank and the number of ranks.
        gather: every rank's item on every rank.

    Raises:
        UserError: all of them are damaged, or one is not the run's own: checkpoints are pickles, which can run code
            when they are loaded.
    """
    names: list[str] = gather([path.name for _, path in completed(folder)])[0]
    damaged: dict[Path, str] = {}
    for path in (folder / name for name in reversed(names)):
        _check_links(folder, path)
        reasons = [reason for reason in gather(_fault(path, rank, world)) if reason is not None]
        if not reasons:
            return Found(path, damaged)
        damaged[path] = reasons[0]
    if damaged:
        found = "; ".join(damaged.values())
        raise UserError(
            f"{folder}: no checkpoint is intact: {found}; put one back from a copy, or delete the folder to train from "
            "the beginning"
        )
    return None


def _check_links(folder: Path, checkpoint: Path) -> None:
    """Raise ``UserError`` if a link leads out of the run's folder."""
    run = folder.parent.resolve()
    for path in (folder, checkpoint, *checkpoint.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(run):
            raise UserError(f"{path}: leads out of the run's folder; a run resumes from its own checkpoints alone")


def _fault(path: Path, rank: int, world: int) -> str | None:
    """Return what is wrong with this rank's share of a checkpoint's files."""
    try:
        files = manifest.read(path)
        manifest.check(path, files, list(files)[rank::world])
    except manifest.Damaged as error:
        return str(error)
    return None


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints to ``step_N.damaged``, so that they no longer count; one rank calls this."""
    for path in damaged:
        aside = path.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def clear(folder: Path) -> None:
    """Remove what a crash left half-written or half-removed; one rank calls this."""
    for leftover in folder.glob("*.unfinished"):
        shutil.rmtree(leftover)


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], Mapping[str, Entry]],
    *,
    keep: int,
    first: bool,
    gather: Callable[[Any], list[Any]],
) -> None:
    """Write a checkpoint so that a crash at any moment leaves all of it or none. Collective.

    Args:
        folder: the run's ``checkpoints``.
        step: optimizer steps finished.
        write: fills a folder; called on every rank. Returns manifest entries of files that it hashed while writing.
        keep: number of checkpoints to keep, this one included.
        first: whether this rank writes the manifest, renames and removes.
        gather: every rank's item on every rank.

    Raises:
        UserError: on all ranks, if one could not write, for example on a full disk; earlier checkpoints are untouched.
    """
    saving = _Saving(folder, step, write, keep)
    for action, takes_part in ((saving.begin, first), (saving.fill, True), (saving.finish, first)):
        error, reason = None, None
        try:
            if takes_part:
                action()
        except (OSError, RuntimeError) as raised:  # PyTorch turns the one into the other
            error, reason = raised, cause_of(raised, folder) or str(raised)

        # All ranks learn what was written, and whether one of them could not.
        answers = gather((reason, dict(saving.known)))
        for _, entries in answers:
            saving.known.update(entries)
        reasons = [text for text, _ in answers if text is not None]
        if not reasons:
            continue
        if error is not None and cause_of(error, folder) is None:
            raise error
        if first:
            shutil.rmtree(saving.unfinished, ignore_errors=True)
        raise _not_written(folder, step, reasons[0])


class _Saving:
    """A checkpoint being written: ``begin`` and ``finish`` on the first rank, ``fill`` on every rank between them."""

    def __init__(self, folder: Path, step: int, write: Callable[[Path], Mapping[str, Entry]], keep: int) -> None:
        self.folder, self.step, self.write, self.keep = folder, step, write, keep
        self.unfinished, self.final = folder / f"step_{step}.unfinished", folder / f"step_{step}"
        self.known: dict[str, Entry] = {}

    def begin(self) -> None:
        clear(self.folder)
        self.unfinished.mkdir(parents=True)
        faults.point("checkpoint.begin")

    def fill(self) -> None:
        self.known.update(self.write(self.unfinished))

    def finish(self) -> None:
        flush_all(self.unfinished)
        manifest.write(self.unfinished, self.known)
        if self.final.exists():
            shutil.rmtree(self.final)
        faults.point("checkpoint.rename")
        self.unfinished.rename(self.final)
        flush(self.folder)
        older = [path for number, path in completed(self.folder) if number < self.step]
        for old in older[: max(0, len(older) - self.keep + 1)]:
            # Renamed first, so that a half-removed folder is not taken for a checkpoint.
            doomed = old.with_suffix(".unfinished")
            old.rename(doomed)
            faults.point("checkpoint.prune")
            shutil.rmtree(doomed)


def _not_written(folder: Path, step: int, reason: str) -> UserError:
    """Return the error of a checkpoint that could not be written."""
    earlier = completed(folder)
    needed = f" (the one before took {size(earlier[-1][1]):,} bytes)" if earlier else ""
    again = f"step {earlier[-1][0]}" if earlier else "its beginning"
    return UserError(
        f"the checkpoint of step {step} could not be written{needed}: {reason}; "
        f"mend that and start the run again, which continues from {again}"
    )


def best_score(folder: Path, compared_by: Mapping[str, Any], done: int) -> float | None:
    """Return the score of the best student so far; ``None`` if none is kept.

    Args:
        folder: the run's ``best``.
        compared_by: a score measured in another way does not count.
        done: steps finished; later scores will be measured again.

    Raises:
        Damaged: the best student differs from what was written.
    """
    if not folder.is_dir():
        return None
    manifest.check(folder, manifest.read(folder))
    about = read_object(folder / "best.json", {"score": float | int, "step": int})
    same = all(about.get(key) == value for key, value in compared_by.items())
    return about["score"] if same and about["step"] <= done else None


def save_best(folder: Path, write: Callable[[Path], None], about: Mapping[str, Any]) -> None:
    """Replace the best student; one rank calls this.

    A crash may leave none, but never half of one: the evaluation follows its checkpoint, and is repeated.

    Args:
        folder: the run's ``best``.
        write: fills a folder with the student.
        about: what ``best.json`` says.
    """

    def write_both(unfinished: Path) -> None:
        write(unfinished)
        (unfinished / "best.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")

    put_in_place(folder, write_both, "best")
