"""Pairs of ranks that go through phases, of which one breaks in its way: ``watched_ranks.py FOLDER WAY …``.

All are forked from this process, which has imported what they need. What a pair says goes to ``FOLDER/WAY``; at the end
their exit codes are printed as JSON.
"""

import json
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from vlm_distill.runtime.launch import Failure, leave, reserved_port
from vlm_distill.runtime.stopping import Stopping
from vlm_distill.runtime.watchdog import Watch

LIMIT = 3.0  # seconds


def broken(way):
    if way == "slow":
        time.sleep(60)
    if way == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "failed":
        raise Failure("no memory", 3)


def go_through_phases(way, rank):
    dist.init_process_group("gloo")
    dist.barrier()  # all of these processes start at once: how long ranks take to find each other is not watched
    watch = Watch(rank, 2, LIMIT)
    try:
        for step in range(4):
            watch.phase(f"step {step}, reading data")
            if rank == 1 and step == 2:
                broken(way)
            watch.phase(f"step {step}, adding up")
            dist.all_reduce(torch.ones(1))
            time.sleep(0.3)
        watch.phase("an evaluation", limited=False)
        with Stopping(watch) as stopping, stopping.at_once():
            if way == f"told {rank}":
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.5 * LIMIT)
            with watch.waiting():
                dist.barrier()
    except Exception as error:
        watch.fail(error, error if isinstance(error, Failure) else None)
    watch.close()
    leave(0)


def fork(way, rank, port, said):
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        go_through_phases(way, rank)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(70)


if __name__ == "__main__":
    folder, ways = Path(sys.argv[1]), sys.argv[2:]
    pairs, reserved = {}, ExitStack()
    for way in ways:
        port = reserved.enter_context(reserved_port())
        pairs[way] = [fork(way, rank, port, folder / way) for rank in (0, 1)]
    codes = {}
    for way, (first, second) in pairs.items():
        codes[way] = [os.waitpid(first, 0)[1]]
        if way == "stopped":
            os.kill(second, signal.SIGKILL)
        codes[way] += [os.waitpid(second, 0)[1]]
    print(json.dumps({way: [os.waitstatus_to_exitcode(status) for status in both] for way, both in codes.items()}))
