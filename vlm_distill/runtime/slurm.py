"""SLURM: where srun says which rank a process is, and where the ranks meet. No other file reads its variables."""

from __future__ import annotations

import os
import re

_LOWEST_PORT = 10_000
_PORTS = 19_000  # up to 28,999: Linux hands out ephemeral ports from 32,768
_STEPS_PER_JOB = 16


def adopt_step() -> None:
    """Set the variables that torch reads (``RANK``, ``MASTER_ADDR``, …) if srun started this process.

    Variables that are set already stay as they are.
    """
    if "SLURM_STEP_ID" in os.environ:
        for theirs, ours in (("SLURM_PROCID", "RANK"), ("SLURM_LOCALID", "LOCAL_RANK"), ("SLURM_NTASKS", "WORLD_SIZE")):
            if theirs in os.environ:
                os.environ.setdefault(ours, os.environ[theirs])
    if "SLURM_STEP_NODELIST" in os.environ:
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(port_of_step()))


def is_task() -> bool:
    """Return whether this process is a task of SLURM, which may show each task its own GPU alone."""
    return "SLURM_LOCALID" in os.environ


def tasks_of_step() -> int:
    """Return the number of tasks that srun has started together with this process; 1 if srun did not start it."""
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1


def port_of_step() -> int:
    """Return the port at which the ranks of this job step meet: the same on all its nodes.

    Jobs and steps that share a machine get different ports, unless there are very many of them.
    """
    job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _LOWEST_PORT + (_STEPS_PER_JOB * job + step) % _PORTS


def first_host(nodelist: str) -> str:
    """Return the first host of SLURM's compressed list: ``gpu03-ib`` for ``gpu[03-07,12]-ib``."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodelist).split(",")[0]
