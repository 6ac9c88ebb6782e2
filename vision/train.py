"""One rank of a classifier's training: ``deepspeed --num_gpus 8 --module vision.train CONFIG [key=value …]``.

torchrun and srun start it the same way; without a launcher it is a run of one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vlm_distill.config import load_config
from vlm_distill.launch import guarded, leave

from .config import ClassifierConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if not word.startswith("--local_rank")]  # DeepSpeed's launcher adds it
    return guarded(lambda: _train(words))


def _train(words: Sequence[str]) -> None:
    config = load_config(words[0] if words else "(no configuration named)", words[1:], ClassifierConfig)
    if config.training.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Imported late: DeepSpeed chooses its accelerator when it is imported, and takes seconds.
    from vlm_distill.training.engine import Processes

    from .trainer import train

    processes = Processes(config.training.device)
    try:
        train(config, processes)
    finally:
        processes.close()


if __name__ == "__main__":
    leave(main())
