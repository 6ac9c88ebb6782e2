"""A lock file that one process at a time holds, and that names its holder."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import IO

# Errors for a lock that another process holds; a file system without locks reports another.
_HELD = (errno.EACCES, errno.EAGAIN)


class Taken(Exception):
    """Another process holds the file: its text says which, as ``process 12 on node3``."""


def hold(path: Path) -> IO[str]:
    """Lock a file, created if missing, until the returned file is closed.

    The operating system holds the lock: it ends with this process, however that ends, and is not inherited by
    processes started from it. On a file system without locks everyone gets it.

    Raises:
        Taken: another process holds it.
        OSError: it cannot be written.
    """
    file = path.open("a+", encoding="utf-8")
    _lock(file, shared=False)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def holder(path: Path) -> str | None:
    """Return which other process holds a file; ``None`` if none does, or nobody can know.

    The holder must not call this: closing the file would release its own lock.
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
