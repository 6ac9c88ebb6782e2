"""Starts a module on several processes of this machine, and ends commands on a person's mistakes in one line."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from data.errors import UserError

# Exit codes.
MISTAKE = 2
OUT_OF_MEMORY = 3
WAITED = 4
#: Names the file in which a rank that ran out of memory leaves the overrides to start again with.
RESTART = "VLM_DISTILL_RESTART"
# Holds the id of the process that has started this one as a rank.
_LAUNCHER = "VLM_DISTILL_LAUNCHER"
_PR_SET_PDEATHSIG = 1
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES)
# Seconds after a rank has failed: the others may end by themselves, then they are asked to, then they are killed.
_BY_THEMSELVES = 2.0
_OTHERS_ARE_STOPPED = 4.0
_PATIENCE = 10.0
_LOOK_AGAIN = 0.1
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class Failure(Exception):
    """Why a run ends, in one line, where it is nobody's mistake.

    Args:
        message: the line.
        code: the process's exit code.
        again: overrides with which the run would go on.
    """

    def __init__(self, message: str, code: int, again: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.again = tuple(again)


class Stopped(SystemExit):
    """Ends a command that was told to stop, with this exit code. Whatever is worth keeping has been saved."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def launch_training(module: str, arguments: Sequence[str], nproc: int) -> int:
    """What :func:`launch` does, for a training: out of memory, it is started again as its ranks say, if they do."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "overrides"
        os.environ[RESTART] = str(path)
        try:
            while (code := launch(module, arguments, nproc)) == OUT_OF_MEMORY and path.exists():
                again = path.read_text().split()
                path.unlink()
                print(f"vlm-distill: starting again with {' '.join(again)}", file=sys.stderr, flush=True)
                arguments = [*arguments, *again]
        finally:
            del os.environ[RESTART]
    return code


def launch(module: str, arguments: Sequence[str], nproc: int) -> int:
    """Runs ``python -m module arguments`` on ``nproc`` processes, and returns the exit code.

    SIGTERM and SIGINT are passed on to every process: they decide what to do, and their exit code is returned.

    Args:
        module: an entry point such as ``vlm_distill.train``.
        arguments: its command line.
        nproc: processes on this machine; one a GPU.
    """
    settle_accelerator()
    environment = {"PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment[_LAUNCHER] = str(os.getpid())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // nproc)))
    command = [sys.executable, "-m", module, *arguments]
    if nproc == 1:
        return _run(command, [environment])
    with reserved_port() as port:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        return _run(command, [environment | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(nproc)])


def _run(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Runs a command once in each of these environments; returns the exit code."""
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        for process in ranks:
            process.send_signal(number)

    # Not DeepSpeed's launcher, which ends with an error when it is told to stop, and kills ranks one after the other.
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for environment in environments:
            ranks.append(subprocess.Popen(command, env=environment))
        return _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all ranks, and ends the others after one has failed; returns the first failure's exit code."""
    running, code, since = dict(enumerate(ranks)), 0, 0.0
    while running:
        for rank, process in running.items():
            if process.poll() and not code:
                code, since = process.returncode, time.monotonic()
                _tell_signal(rank, process.pid, -code)
        running = {rank: process for rank, process in running.items() if process.returncode is None}
        waited = time.monotonic() - since
        # Ranks that were told to stop end together, and the first may still have to send away its metrics.
        waited -= _PATIENCE if code in _STOPPED else 0.0
        for process in running.values() if code else ():
            if code < 0 or waited > _PATIENCE:
                process.kill()
            elif waited > _BY_THEMSELVES:
                process.terminate()
        time.sleep(_LOOK_AGAIN)
    return code if code >= 0 else 128 - code


def _tell_signal(rank: int, process: int, number: int) -> None:
    """Names a rank that the system has killed, which could not say so itself."""
    if number in _LIKELY:
        print(
            f"vlm-distill: rank {rank} (process {process}) was killed by {signal.Signals(number).name}"
            f"{_LIKELY[number]}; start the command again, which goes on from what is saved",
            file=sys.stderr,
            flush=True,
        )


_LIKELY: dict[int, str] = {
    signal.SIGKILL: ", perhaps because this machine ran out of memory (dmesg tells; fewer data.workers need less)",
    signal.SIGBUS: ", perhaps because a data file was cut short while it was read, or /dev/shm is full",
    signal.SIGSEGV: "",
    signal.SIGABRT: "",
}


def settle_accelerator() -> None:
    """Tells DeepSpeed, before it is imported, that there is no GPU; else it warns of it in every process."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code.

    A person's mistake becomes one line on standard error and exit code 2, without a traceback; SIGINT and SIGTERM
    become one line and 128 + their number. A rank ends with the process that has started it, however that ends.
    """
    _end_with_launcher()
    try:
        with _ended_by_signals():
            _with_paths_told(command)
    except UserError as mistake:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" [rank {rank}]"
        if where:
            # Most mistakes are every rank's: the first tells it, and stops the others before they say it again.
            time.sleep(_OTHERS_ARE_STOPPED)
        print(f"vlm-distill{where}: {mistake}", file=sys.stderr, flush=True)
        return MISTAKE
    except Failure as failure:
        print(f"vlm-distill: {failure}", file=sys.stderr, flush=True)
        return failure.code
    except Stopped as stopped:
        return stopped.exit_code
    return 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While it is open, SIGINT and SIGTERM end this process by :class:`Stopped`, which leaves every ``with`` in order.

    One of several ranks ends at once instead: to leave in order, it would wait for the others.
    """

    def end(number: int, _: object) -> None:
        for again in before:
            signal.signal(again, signal.SIG_IGN)
        code = 128 + number
        if os.environ.get("RANK", "0") == "0":
            said = "stopped; start the command again to go on from what is saved"
            print(f"vlm-distill: {said}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            leave(code)
        raise Stopped(code)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # A job in the background of a shell is not to be interrupted.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_launcher() -> None:
    """Have the system kill this rank when the process that has started it is gone, killed by SIGKILL for example."""
    launcher = os.environ.pop(_LAUNCHER, None)  # what this process starts has another
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it was gone before the system was asked
        leave(128 + signal.SIGKILL)


def _with_paths_told(command: Callable[[], object]) -> None:
    try:
        command()
    except (OSError, RuntimeError) as error:
        mistake = mistake_of(error)
        if mistake is None:
            raise
        raise UserError(mistake) from None


def mistake_of(error: Exception) -> str | None:
    """A path that no file can have or that may not be read, or a full disk, in one line; ``None``: something else."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        # Of a copy the second name is that of the file that was written.
        return f"{error.filename2 or error.filename or 'output'}: {os.strerror(error.errno).lower()}"
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename is not None:
        return f"{str(error.filename)[:200]}: {error.strerror}; check the path"
    # Of `Path.resolve`, before Python 3.13.
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return f"{error}; check the path"
    return None


def leave(code: int) -> NoReturn:
    """Ends a rank's process, of which everything has been written and closed, without unloading libraries.

    With several ranks on a CPU a process aborts now and then while the threads of its communication are torn down.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def reserved_port() -> Iterator[int]:
    """A TCP port on which nothing on this machine listens, and which the system gives to nobody else inside it.

    Ranks name it seconds later, to meet there, and get it.
    """
    with socket.socket() as held:
        # Linux lets a socket listen where another with this option is bound and does not listen, if it names the port.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        yield port


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
