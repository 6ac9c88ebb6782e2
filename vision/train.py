"""One rank of a classifier's training: ``deepspeed --num_gpus 8 --module vision.train CONFIG [key=value …]``.

torchrun and srun start it the same way; without a launcher it is a run of one process.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_distill import train
from vlm_distill.runtime.launch import leave

from .config import ClassifierConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit code."""
    return train.main(arguments, ClassifierConfig, "vision.trainer")


if __name__ == "__main__":
    leave(main())
