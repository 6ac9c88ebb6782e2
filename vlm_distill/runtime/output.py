"""The run's folder: claim it for one run, write into it so that a crash leaves no half, explain failed writes."""

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
    """Create the folder and lock it for this process, until the returned file is closed.

    Raises:
        UserError: it cannot be written, or another process holds it.
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
    """Return the operating system's reason why a write failed, in words; ``None`` for other errors.

    Args:
        error: what was raised, perhaps by PyTorch because of the system's error.
        path: named if the error names no file.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    number = _number_in(str(error)) if seen is None else seen.errno
    if number is None:
        return None
    # When a copy fails, the second name is the file that was written.
    named = (seen.filename2 or seen.filename) if seen is not None else None
    what = f"{named or path}: {os.strerror(number).lower()}"
    if number not in _FULL:
        return what
    return f"{what}, {_free(path):,} bytes are free there"


def _number_in(text: str) -> int | None:
    """Return the system's error number that a message quotes, as safetensors' do."""
    quoted = re.search(r"\(os error (\d+)\)", text)
    return int(quoted[1]) if quoted else None


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def put_in_place(folder: Path, write: Callable[[Path], None], point: str) -> None:
    """Write a folder and its manifest aside, then move it into place, replacing an older one; one rank calls this.

    A crash may leave no folder, but never half of one.

    Args:
        folder: its final path.
        write: fills a folder.
        point: name of the moment between old and new, for tests that kill there.

    Raises:
        UserError: it could not be written, for example on a full disk; the older folder stays.
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
    """Wait until all files in a folder are on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
