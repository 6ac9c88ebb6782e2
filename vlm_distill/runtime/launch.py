"""Start a module on several processes of this machine; end commands with one line and an exit code."""

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
#: Names the file in which a rank that ran out of memory leaves overrides to restart with.
RESTART = "VLM_DISTILL_RESTART"
# Holds the id of the process that started this one as a rank.
_LAUNCHER = "VLM_DISTILL_LAUNCHER"
_PR_SET_PDEATHSIG = 1
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES)
# Seconds after a rank has failed: the others may end by themselves, then get SIGTERM, then are killed.
_BY_THEMSELVES = 2.0
_OTHERS_ARE_STOPPED = 4.0
_PATIENCE = 10.0
_LOOK_AGAIN = 0.1
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class Failure(Exception):
    """The end of a run that is not the user's mistake.

    Args:
        message: the reason, in one line.
        code: the process's exit code.
        again: overrides to restart the run with.
    """

    def __init__(self, message: str, code: int, again: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.again = tuple(again)


class Stopped(SystemExit):
    """Ends a command after a signal to stop, with this exit code, once everything is saved."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def launch_training(module: str, arguments: Sequence[str], nproc: int) -> int:
    """Launch a training; restart it after it ran out of memory, if its ranks left overrides for that."""
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
    """Run ``python -m module arguments`` on ``nproc`` processes, and return the exit code.

    SIGTERM and SIGINT are passed on to every process, which decides what to do.

    Args:
        module: an entry point such as ``vlm_distill.train``.
        arguments: its command line.
        nproc: processes on this machine, one per GPU.
    """
    environment = ended_with_launcher({"PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ})
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // nproc)))
    command = [sys.executable, "-m", module, *arguments]
    if nproc == 1:
        return _run(command, [environment])
    with reserved_port() as port:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        return _run(command, [environment | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(nproc)])


def ended_with_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which a command of ours, or a rank, ends when this process does, however that ends."""
    return {**environment, _LAUNCHER: str(os.getpid())}


def _run(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Run a command once in each of these environments. Return the exit code."""
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        for process in ranks:
            process.send_signal(number)

    # DeepSpeed's launcher ends with an error on SIGTERM, and kills ranks one after the other.
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
    """Wait for all ranks, and end the others after one has failed. Return the first failure's exit code."""
    running, code, since = dict(enumerate(ranks)), 0, 0.0
    while running:
        failed = [rank for rank, process in running.items() if process.poll()]
        if failed and not code:
            # Of several, name one that a signal ended: its connections broke, which ended the others.
            rank = min(failed, key=lambda rank: ranks[rank].returncode)
            code, since = ranks[rank].returncode, time.monotonic()
            _tell_signal(rank, ranks[rank].pid, -code)
        running = {rank: process for rank, process in running.items() if process.returncode is None}
        waited = time.monotonic() - since
        # Ranks that received a signal end together; the first may still be sending its metrics.
        waited -= _PATIENCE if code in _STOPPED else 0.0
        for process in running.values() if code else ():
            if code < 0 or waited > _PATIENCE:
                process.kill()
            elif waited > _BY_THEMSELVES:
                process.terminate()
        time.sleep(_LOOK_AGAIN)
    return code if code >= 0 else 128 - code


def _tell_signal(rank: int, process: int, number: int) -> None:
    """Name a rank that the system killed, since it cannot say so itself."""
    if number in _LIKELY:
        print(
            f"vlm-distill: rank {rank} (process {process}) was killed by {signal.Signals(number).name}"
            f"{_LIKELY[number]}; start the command again to continue from what is saved",
            file=sys.stderr,
            flush=True,
        )


_LIKELY: dict[int, str] = {
    signal.SIGKILL: ", perhaps because this machine ran out of memory (see dmesg; fewer data.workers need less)",
    signal.SIGBUS: ", perhaps because a data file was cut short while it was read, or /dev/shm is full",
    signal.SIGSEGV: "",
    signal.SIGABRT: "",
}


def settle_accelerator() -> None:
    """Tell DeepSpeed before it is imported if there is no GPU, or it warns in every process."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _show_bars_once() -> None:
    """Leave the bars of Hugging Face's libraries (downloads, weights) to one rank, and to terminals."""
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when they are imported


def guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code.

    A user's mistake becomes one line on standard error and exit code 2, without a traceback; SIGINT and SIGTERM become
    one line and 128 + their number. A rank ends when the process that started it does, however that ends.
    """
    _end_with_launcher()
    _show_bars_once()
    try:
        with _ended_by_signals(), _path_errors_explained():
            command()
    except UserError as mistake:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" [rank {rank}]"
        if where:
            # Most mistakes are found on every rank: the first prints them, and stops the others before they do.
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
    """Context manager: inside it, SIGINT and SIGTERM raise :class:`Stopped`, which leaves every ``with`` in order.

    One of several ranks ends at once instead: leaving in order could mean waiting for the others.
    """

    def end(number: int, _: object) -> None:
        for again in before:
            signal.signal(again, signal.SIG_IGN)
        code = 128 + number
        if os.environ.get("RANK", "0") == "0":
            said = "stopped; start the command again to continue from what is saved"
            print(f"vlm-distill: {said}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            leave(code)
        raise Stopped(code)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell's background job ignores SIGINT; keep it so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_launcher() -> None:
    """Have the system kill this rank when the process that started it is gone, for example by SIGKILL."""
    launcher = os.environ.pop(_LAUNCHER, None)  # processes started from here have another launcher
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it ended before prctl was called
        leave(128 + signal.SIGKILL)


@contextmanager
def _path_errors_explained() -> Iterator[None]:
    """Context manager: raise an impossible path or a full disk as a ``UserError``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        mistake = mistake_of(error)
        if mistake is None:
            raise
        raise UserError(mistake) from None


def mistake_of(error: Exception) -> str | None:
    """Return one line for an impossible or unreadable path or a full disk; ``None`` for other errors."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        # When a copy fails, the second name is the file that was written.
        return f"{error.filename2 or error.filename or 'output'}: {os.strerror(error.errno).lower()}"
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename is not None:
        return f"{str(error.filename)[:200]}: {error.strerror}; check the path"
    # Raised by `Path.resolve` before Python 3.13.
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return f"{error}; check the path"
    return None


def leave(code: int) -> NoReturn:
    """End a rank's process without unloading libraries, after everything was written and closed.

    With several ranks on a CPU, tearing down the communication threads aborts the process now and then.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Context manager: a free TCP port of this machine, which the system gives to nobody else inside it.

    Ranks that ask for this port seconds later, to meet there, get it.
    """
    with socket.socket() as held:
        # On Linux a socket may listen at a port where another with this option is bound without listening.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        yield port


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
