"""The GPUs of this machine, counted without PyTorch, and how many processes a command starts on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from . import slurm


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = [name.strip() for name in named.split(",") if name.strip()]
        # CUDA ignores what follows a number that is no device's: -1 hides all of them.
        hidden = [number for number, name in enumerate(names) if name.startswith("-")]
        return names[: hidden[0]] if hidden else names
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return told.split()


def process_count(asked: int | None, device: str = "auto") -> int:
    """Return how many processes a command starts: ``asked``, or one for each GPU, or 1 on a CPU.

    A process that another launcher has started as one of its ranks starts one.

    Args:
        asked: the option ``--nproc``, if it was given.
        device: the run's ``training.device``.
    """
    if asked is not None:
        return asked
    if device == "cpu" or "RANK" in os.environ or slurm.tasks_of_step() > 1:
        return 1
    count = len(visible_gpus())
    if count > 1:
        print(f"vlm-distill: {count} GPUs, a process for each (--nproc sets another number)", file=sys.stderr)
    return max(1, count)
