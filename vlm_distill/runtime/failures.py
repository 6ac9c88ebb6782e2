"""Turn fatal conditions (out of memory, missing file, dead worker, NaN) into one-line errors."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.errors import UserError
from vlm_distill.config.batch_split import halved
from vlm_distill.config.sections import AnyRun

from .launch import MISTAKE, OUT_OF_MEMORY, RESTART, Failure, mistake_of

# PyTorch has no error class for the memory of a CPU; it is recognised by its text.
_CPU_MEMORY = re.compile(r"can't allocate memory|not enough memory", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU or the CPU ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_MEMORY.search(str(error)) is not None


def explain(error: Exception, phase: str, device: torch.device) -> Failure | None:
    """Return a one-line reason for an exception; ``None`` for a bug, whose traceback says more.

    Args:
        error: what was raised.
        phase: what the rank was doing, to follow "in".
        device: this rank's.
    """
    if isinstance(error, Failure):
        return error
    mistake = str(error) if isinstance(error, UserError) else mistake_of(error)
    if mistake is not None:
        return Failure(mistake, MISTAKE)
    if out_of_memory(error):
        batch = "on_policy" if phase.endswith("drawing answers") else "evaluation"
        remedy = f"lower {batch}.batch_size, raise deepspeed.stage or shard the teacher"
        return Failure(f"out of memory in {phase}: {_peak(device)}; {remedy}", OUT_OF_MEMORY)
    return None


def out_of_memory_in_step(
    error: Exception, config: AnyRun, world: int, device: torch.device, *, phase: str, shape: str, recomputes: bool
) -> Failure:
    """Return the failure of a step that did not fit, with overrides to restart with if ``on_oom`` is ``halve``.

    Args:
        error: one that :func:`out_of_memory` recognises.
        config: the run's.
        world: number of ranks.
        device: this rank's.
        phase: what the rank was doing.
        shape: size of the micro-batch, in words.
        recomputes: whether to suggest ``training.recompute_logits``.
    """
    smaller, training = halved(config, world), config.training
    remedies = [f"training.micro_batch_size={smaller}"] if smaller else []
    remedies += ["training.recompute_logits=true"] if recomputes else []
    remedies += [] if training.activation_checkpointing else ["training.activation_checkpointing=true"]
    remedies += [] if config.deepspeed.stage == 3 or world == 1 else [f"deepspeed.stage={config.deepspeed.stage + 1}"]
    try_these = (
        f"try {', '.join(remedies)}" if remedies else "no setting is left that would help; the model needs more memory"
    )
    said = f"out of memory in {phase}, a micro-batch of {shape}: {_peak(device)}; {try_these}"
    if training.on_oom == "fail":
        return Failure(said, OUT_OF_MEMORY)
    if smaller is None:
        return Failure(f"{said}; training.on_oom: halve cannot help, the micro-batch is already 1", OUT_OF_MEMORY)
    if RESTART not in os.environ:
        said += "; training.on_oom: halve works under vlm-distill train; this launcher does not restart"
    return Failure(said, OUT_OF_MEMORY, [f"training.micro_batch_size={smaller}", "training.resume=true"])


def start_again(failure: Failure) -> None:
    """Leave the overrides to restart with, for the command that started this rank."""
    if failure.again and RESTART in os.environ:
        # Several ranks may do this at once; all write the same.
        path = Path(os.environ[RESTART])
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        aside.write_text(" ".join(failure.again))
        aside.replace(path)


def not_finite(step: int, terms: Sequence[str], found: Sequence[str], *, gradient: bool) -> UserError:
    """Return the error of a run whose loss or gradient is NaN or infinite.

    Args:
        step: counted from 1.
        terms: names of the losses that are not finite.
        found: the micro-batches concerned, with their rank and samples, over all ranks.
        gradient: whether every loss is finite and the gradient is not.
    """
    if gradient:
        what = f"step {step}: the gradient is not finite, though every loss is"
    else:
        what = f"step {step}: {', '.join(terms)} is not finite"
    where = f", in {'; '.join(found[:3])}" if found else ""
    more = f" and {len(found) - 3} more micro-batches" if len(found) > 3 else ""
    return UserError(
        f"{what}{where}{more}; nothing of this step is saved. Look at these samples, or lower optimizer.lr, "
        "optimizer.max_grad_norm or the loss's weight, and start again from the last checkpoint"
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes: allocated on the GPU since the last reset, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak(device: torch.device) -> str:
    peak = f"at most {peak_memory(device) / 2**30:.1f} GiB"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{peak} were in use, of {total / 2**30:.1f} GiB {free / 2**30:.1f} are free now"
    return f"{peak} of main memory were in use"
