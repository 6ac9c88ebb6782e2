"""Scripts of several trainings, run once on one rank and once on two: launches are slow, so that tests share them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
