"""A rank that goes through phases with another one, and a way in which one of them stops: ``watched_ranks.py WAY``."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from vlm_distill.launch import Failure, leave
from vlm_distill.training.watchdog import Watch

LIMIT = 3.0  # seconds

dist.init_process_group("gloo")
rank, way = dist.get_rank(), sys.argv[1]
watch = Watch(rank, 2, LIMIT)


def broken():
    if way == "slow":
        time.sleep(60)
    if way == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "failed":
        raise Failure("no memory", 3)


try:
    for step in range(4):
        watch.phase(f"step {step}, reading data")
        if rank == 1 and step == 2:
            broken()
        watch.phase(f"step {step}, adding up")
        dist.all_reduce(torch.ones(1))
        time.sleep(0.3)
    watch.phase("an evaluation", limited=False)
    time.sleep(1.5 * LIMIT)
    with watch.waiting():
        dist.barrier()
except Exception as error:
    watch.fail(error, error if isinstance(error, Failure) else None)
watch.close()
print("done")
leave(0)
