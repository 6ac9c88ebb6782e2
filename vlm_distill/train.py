"""One rank of a training run: ``deepspeed --num_gpus 8 --module vlm_distill.train CONFIG [key=value …]``.

torchrun and srun start it in the same way; without a launcher the run is a single process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

from vlm_distill.neighbours import check_neighbours

check_neighbours()  # before anything of `data` is imported

from data.errors import UserError
from vlm_distill.cli.options import RunOptions, parse
from vlm_distill.config.file import load_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.launch import guarded, leave


def main(
    arguments: Sequence[str] | None = None,
    kind: type[Any] = RunConfig,
    trainer: str = "vlm_distill.trainer",
    work: str = "train",
) -> int:
    """Train, and return the exit code.

    Args:
        arguments: a configuration's path and overrides; ``None``: the command line's.
        kind: the model of the configuration.
        trainer: the module with the function to call.
        work: the function's name.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(partial(_train, words, kind, trainer, work))


def _train(words: Sequence[str], kind: type[Any], trainer: str, work: str) -> None:
    options = parse(RunOptions, words)
    config = load_config(options.config, options.overrides or (), kind)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.training.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Imported late: DeepSpeed chooses its accelerator when it is imported, and takes seconds.
    from vlm_distill.runtime.processes import Processes

    run = getattr(import_module(trainer), work)
    from vlm_distill.runtime.failures import explain, start_again

    processes = Processes(config.training.device, config.training.timeout)
    try:
        run(config, processes)
    except Exception as error:
        failure = explain(error, processes.watch.where, processes.device)
        if failure is not None:
            start_again(failure)
        if processes.world > 1:
            # Not closed first: the other ranks may never get there.
            processes.watch.fail(error, failure)
        if failure is None or isinstance(error, UserError):
            raise
        raise failure from None
    finally:
        processes.close()


if __name__ == "__main__":
    leave(main())
