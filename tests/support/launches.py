"""Scripts of several trainings, run once on one rank and once on two: launches are slow, so that tests share them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from vlm_distill.runtime.launch import reserved_port

_ROOT = Path(__file__).parents[2]


def on_one_rank_and_two(script: Path, folder: Path) -> Callable[[int, str], Any]:
    """Runs a script, which writes ``folder/ranks{world}/{name}.json``, and gives what reads these."""
    # The tree that this file lies in first, wherever the package is installed from.
    paths = os.pathsep.join(map(str, [_ROOT, script.parent, Path(__file__).parent]))
    # Nor what tells of this process being a rank, where a test has made it one.
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    # Not a fixed port, which another run on this machine may hold.
    with reserved_port() as port:
        launcher = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
        for command in ([sys.executable], [sys.executable, "-m", *launcher]):
            words = [*command, str(script), str(folder)]
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr[-4000:]
    return lambda world, name: json.loads((folder / f"ranks{world}" / f"{name}.json").read_text())


def is_slow(world: int, name: str, shared: Collection[str], near: Collection[str]) -> bool:
    """Return whether ``make test`` skips a training on this number of ranks.

    Of the same training under several ZeRO stages, one rank runs the one without ZeRO, and two ranks the highest: what
    differs from rank to rank and from stage to stage differs between these two. The plainest runs everywhere.

    Args:
        world: the number of ranks.
        name: of the training; ends with its ZeRO stage.
        shared: the trainings that run on one rank and on two.
        near: the trainings that are near to another one.
    """
    if name in near:
        return True
    family, stage = name[:-1], name[-1]
    if family == "zero" or name not in shared:
        return False
    fast = [s for s in "0123" if f"{family}{s}" in shared and f"{family}{s}" not in near]
    return stage != (min(fast) if world == 1 else max(fast))


def marked(tests: Iterable[Any], reads: Callable[..., Iterable[tuple[int, str]]], slow: Callable[[int, str], bool]):
    """Return parameters of tests, each slow if it reads a slow training.

    Args:
        tests: the parameters.
        reads: makes of a test's parameters the (ranks, name) of the trainings that it reads.
        slow: says whether one of these is slow.
    """
    found = []
    for test in tests:
        values = test if isinstance(test, tuple) else (test,)
        marks = pytest.mark.slow if any(slow(world, name) for world, name in reads(*values)) else ()
        found.append(pytest.param(*values, marks=marks))
    return found


def without_zero(name: str, shared: Collection[str]) -> str:
    """Return the same training without ZeRO, if there is one."""
    plain = f"{name[:-1]}0"
    return plain if plain in shared else name
