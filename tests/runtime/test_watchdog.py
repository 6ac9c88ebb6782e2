"""Two ranks, of which one is slow, stopped, killed, fails or is told to stop: both end, and the line names it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
WAYS = {
    # Exit code of both, and what is said.
    "none": (0, r"^$"),
    "slow": (4, r"rank 1 \(.+, process \d+\) has been in step 2, reading data for \d+ s; the others wait for it"),
    "stopped": (4, r"rank 1 \(.+\) has not been heard of for \d+ s, last in step \d, .*; the others wait for it"),
    "killed": (4, r"rank 1 \(.+\) has not been heard of for \d+ s, last in step \d, .*: it was killed or crashed"),
    "failed": (3, r"vlm-distill \[rank 1\]: no memory"),
    # In an evaluation, to one of them alone.
    "told 0": (143, r"^vlm-distill: stopping: the checkpoint is written"),
    "told 1": (143, r"^vlm-distill \[rank 1\]: stopping: the checkpoint is written"),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """Exit codes of both ranks and their standard error, by the way in which one stops."""
    folder = tmp_path_factory.mktemp("watched")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("watched_ranks.py")), str(folder), *WAYS],
        env=os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return {way: (*codes, (folder / way).read_text()) for way, codes in json.loads(done.stdout).items()}


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
