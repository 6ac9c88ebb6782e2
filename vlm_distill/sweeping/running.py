"""Run a sweep's commands, several at once, each in a process of its own with its share of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlm_distill.runtime.gpus import visible_gpus
from vlm_distill.runtime.launch import cores, ended_with_launcher

_LOOK_AGAIN = 0.2


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        name: for messages.
        words: the command line to start.
        log: file that its output is appended to.
        subject: what it is about, for the caller.
    """

    name: str
    words: Sequence[str]
    log: Path
    subject: Any = None


@dataclass(frozen=True)
class Failed:
    """A job that ended with an error: its exit code, and the last line that it wrote."""

    job: Job
    code: int
    said: str


@dataclass
class _Started:
    job: Job
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    written_before: int


class Machine:
    """The cores and GPUs that jobs share.

    Args:
        at_once: number of jobs that run at once.
        nproc: ranks of each job, one a GPU; ``None``: each job starts one on every GPU of its share.
    """

    def __init__(self, at_once: int, nproc: int | None) -> None:
        self.at_once, self.gpus = at_once, visible_gpus()
        self.nproc = nproc or max(1, len(self.gpus) // at_once)

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment of the job in a slot: its GPUs and its share of the cores."""
        environment = ended_with_launcher({"PYTHONSAFEPATH": "1", **os.environ})
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // (self.at_once * self.nproc))))
        if self.gpus:
            own = [self.gpus[(slot * self.nproc + rank) % len(self.gpus)] for rank in range(self.nproc)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
        return environment


def run_jobs(jobs: Sequence[Job], machine: Machine, ended: Callable[[Job, Failed | None], None]) -> list[Failed]:
    """Run all jobs, ``machine.at_once`` at a time, in order; return those that failed.

    A failed job stops no other. If this process is interrupted, all jobs are stopped, and have ended when this returns:
    a training finishes its step and writes a checkpoint.

    Args:
        jobs: what to run.
        machine: how many at once, and with what.
        ended: called after each job, with its failure if it failed.
    """
    waiting, running = deque(jobs), dict[int, _Started]()
    failures: list[Failed] = []
    try:
        while waiting or running:
            # Fill the free slots in order.
            for slot in range(machine.at_once):
                if waiting and slot not in running:
                    running[slot] = _start(waiting.popleft(), machine.environment(slot))
            for slot, started in list(running.items()):
                if started.process.poll() is not None:
                    del running[slot]
                    failure = _failure(started)
                    failures += [failure] if failure is not None else []
                    ended(started.job, failure)
            if running:
                time.sleep(_LOOK_AGAIN)
    finally:
        _stop(list(running.values()))
    return failures


def _start(job: Job, environment: dict[str, str]) -> _Started:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    output = job.log.open("ab")
    before = output.seek(0, os.SEEK_END)
    process = subprocess.Popen(
        job.words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
    )
    return _Started(job, process, output, before)


def _failure(started: _Started) -> Failed | None:
    """Close an ended job's log; return its failure, if it failed."""
    started.output.close()
    code = started.process.returncode
    if code == 0:
        return None
    if code < 0:
        return Failed(started.job, code, f"killed by {signal.Signals(-code).name}")
    with started.job.log.open("rb") as file:
        file.seek(started.written_before)
        lines = file.read().decode("utf-8", "replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
    return Failed(started.job, code, said.removeprefix("vlm-distill: "))


def _stop(running: Sequence[_Started]) -> None:
    if not running:
        return
    names = ", ".join(started.job.name for started in running)
    print(f"stopping {names}: each writes a checkpoint", file=sys.stderr, flush=True)
    for started in running:
        started.process.terminate()
    for started in running:
        started.process.wait()
        started.output.close()
