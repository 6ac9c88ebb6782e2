"""Two ranks, of which one is slow, stopped, killed or fails: the other ends with it, and the line names it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_distill.launch import free_port

_ROOT = Path(__file__).parents[2]
WAYS = {
    # Exit code of both, and what is said.
    "none": (0, r"^$"),
    "slow": (4, r"rank 1 \(.+, process \d+\) has been in step 2, reading data for \d+ s; the others wait for it"),
    "stopped": (4, r"rank 1 \(.+\) has not been heard of for \d+ s, last in step \d, .*; the others wait for it"),
    "killed": (4, r"rank 1 \(.+\) has not been heard of for \d+ s, last in step \d, .*: it was killed or crashed"),
    "failed": (3, r"vlm-distill \[rank 1\]: no memory"),
}


@pytest.fixture(scope="module")
def endings():
    """Exit codes of both ranks and their standard error, by the way in which the second one stops."""
    running = {}
    for way in WAYS:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        environment = os.environ | meeting | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, str(Path(__file__).with_name("watched_ranks.py")), way]
        running[way] = [
            subprocess.Popen(words, env=environment | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
            for rank in "01"
        ]
    found = {}
    for way, (first, second) in running.items():
        said = first.communicate(timeout=120)[1]
        if way == "stopped":
            second.send_signal(signal.SIGKILL)
        said += second.communicate(timeout=120)[1]
        found[way] = (first.returncode, second.returncode, said)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_ranks_end_together_and_say_why(endings, way):
    expected, says = WAYS[way]
    first, second, said = endings[way]
    assert first == expected, said
    assert second == (-9 if way in ("killed", "stopped") else expected), said
    assert re.search(says, said), said
    assert said.count("vlm-distill") == (0 if way == "none" else 1 + said.count("warning")), said


def test_a_slow_rank_is_named_before_the_end(endings):
    assert re.search(
        r"warning: rank 1 .* has been in step 2, reading data .* here in step 2, adding up", endings["slow"][2]
    )
