"""A file that one process at a time holds, and in which it says who it is."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import IO

# What a file system says of a lock that somebody else has; that it has none at all it says otherwise.
_HELD = (errno.EACCES, errno.EAGAIN)


class Taken(Exception):
    """Another process holds the file: its text says which, as ``process 12 on node3``."""


def hold(path: Path) -> IO[str]:
    """Takes a file, made if there is none, for as long as what is returned stays open.

    The lock is the system's, so that it ends with the process, however that ends, and not with those that it started.
    A file system without locks gives the file to everyone.

    Raises:
        Taken: another process has it.
        OSError: it cannot be written.
    """
    file = path.open("a+", encoding="utf-8")
    _lock(file, shared=False)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def holder(path: Path) -> str | None:
    """Which other process holds a file; ``None`` where none does, or nobody can know.

    Not to be asked by the holder, from whom the system would take it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            # Many may ask at once.
            _lock(file, shared=True)
    except Taken as taken:
        return str(taken)
    except OSError:
        pass
    return None


def _lock(file: IO[str], *, shared: bool) -> None:
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return
        file.seek(0)
        who = file.read().strip() or "another process"
        file.close()
        raise Taken(who) from None
