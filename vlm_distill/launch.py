"""Starts a module on several processes of this machine, and ends commands on a person's mistakes in one line."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from data.errors import UserError

MISTAKE = 2
# Seconds. A launcher stops all ranks within this time of the first that fails.
_OTHERS_ARE_STOPPED = 3
# Seconds in which ranks may say why they end after one of them has failed, and between looks at them.
_PATIENCE = 10
_LOOK_AGAIN = 0.1
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


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
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // nproc)))
    command = [sys.executable, "-m", module, *arguments]
    places: list[dict[str, str]] = [{}]
    if nproc > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        meeting |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        places = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        for process in ranks:
            process.send_signal(number)

    # Not DeepSpeed's launcher, which ends with an error when it is told to stop, and kills ranks one after the other.
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for place in places:
            ranks.append(subprocess.Popen(command, env=environment | place))
        return _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all ranks, and ends the others after one has failed; returns the first failure's exit code."""
    running, code = list(ranks), 0
    patience = float("inf")
    while running:
        for process in running:
            if process.poll():
                code = code or process.returncode
        running = [process for process in running if process.returncode is None]
        if code and running:
            if patience == float("inf"):
                patience = time.monotonic() + _PATIENCE
                for process in running:
                    process.terminate()
            if time.monotonic() > patience:
                for process in running:
                    process.kill()
        time.sleep(_LOOK_AGAIN)
    return code if code >= 0 else 128 - code


def settle_accelerator() -> None:
    """Tells DeepSpeed, before it is imported, that there is no GPU; else it warns of it in every process."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def guarded(command: Callable[[], object]) -> int:
    """Runs a command; a person's mistake becomes one line on standard error and exit code 2, without a traceback."""
    try:
        command()
    except UserError as mistake:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" [rank {rank}]"
        if where:
            # Most mistakes are every rank's: the first tells it, and stops the others before they say it again.
            time.sleep(_OTHERS_ARE_STOPPED)
        print(f"vlm-distill{where}: {mistake}", file=sys.stderr, flush=True)
        return MISTAKE
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        print(f"vlm-distill: {error.filename or 'output'}: {os.strerror(error.errno).lower()}", file=sys.stderr)
        return MISTAKE
    return 0


def leave(code: int) -> NoReturn:
    """Ends a rank's process, of which everything has been written and closed, without unloading libraries.

    With several ranks on a CPU a process aborts now and then while the threads of its communication are torn down.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """A TCP port that nothing on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
