"""The process around a call of the API: what a run changes in it is put back."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data.errors import UserError


@contextmanager
def undisturbed(device: str = "auto") -> Iterator[None]:
    """Context manager: afterwards environment, threads, random numbers and libraries' progress bars are as before.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``, as in ``training.device``.

    Raises:
        UserError: DeepSpeed already runs on another kind of device in this process.
    """
    environment = {name: os.environ.get(name) for name in ("TOKENIZERS_PARALLELISM", "DS_ACCELERATOR")}
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _choose_accelerator(device)
        with _no_bars():
            yield
    finally:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


def _choose_accelerator(device: str) -> None:
    """Tell DeepSpeed the device before it is imported; it chooses once."""
    wanted = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda"
    if "deepspeed" not in sys.modules:
        os.environ["DS_ACCELERATOR"] = wanted
        return
    from vlm_distill.training.engine import accelerator

    if accelerator() != wanted:
        raise UserError(
            f"training.device: DeepSpeed already runs on {accelerator()} in this process; start a new process for a "
            f"run on {wanted}"
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Context manager: Transformers shows no bars while models load."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
