"""The run's folder: that it can be written, that no other run writes there, and what is told where a write fails."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from data.errors import UserError

from . import faults, manifest
from .lock import Taken, hold

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def claim(folder: Path) -> IO[str]:
    """Makes the folder and takes it for this process, for as long as what is returned stays open.

    Raises:
        UserError: it cannot be written, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return hold(folder / ".lock")
    except Taken as other:
        raise UserError(
            f"output: {folder}: another run is writing there ({other}); wait for it or stop it, or choose another "
            "folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"output: {cause_of(error, folder)}; choose another folder, or make this one writable"
        ) from None


def cause_of(error: BaseException, path: Path) -> str | None:
    """The operating system's reason why something could not be written, in words; ``None`` for other errors.

    Args:
        error: what was raised, perhaps by PyTorch in consequence of the system's error.
        path: told where the error names none.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    # safetensors gives the system's number in its text alone.
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    number = seen.errno if seen is not None else int(quoted[1]) if quoted else None
    if number is None:
        return None
    # Of a copy, such as DeepSpeed makes of a script of its own, the second name is that of the file that was written.
    named = (seen.filename2 or seen.filename) if seen is not None else None
    what = f"{named or path}: {os.strerror(number).lower()}"
    if number not in _FULL:
        return what
    return f"{what}, {_free(path):,} bytes are free there"


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def put_in_place(folder: Path, write: Callable[[Path], None], point: str) -> None:
    """Write a folder and its manifest aside and put it in the place of one of the same name; one rank calls this.

    A crash may leave none, but never half of one.

    Args:
        folder: where it is to be.
        write: fills a folder.
        point: the name of the place between old and new, for tests that kill there.

    Raises:
        UserError: the system could not write it, as on a full disk; what was there stays.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        flush_all(unfinished)
        manifest.write(unfinished)
    except Exception as error:
        reason = cause_of(error, folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        if reason is None:
            raise
        raise UserError(f"{reason}; mend that and start the run again, which repeats only this") from None
    shutil.rmtree(folder, ignore_errors=True)
    faults.point(point)
    unfinished.rename(folder)


def flush_all(folder: Path) -> None:
    """Waits until all files in a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            flush(path)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
