"""Ranks of a training of which one breaks: ``BROKEN`` is ``full``, ``killed`` or ``straight``, of the environment."""

import os
import signal

import torch

from vlm_distill import train
from vlm_distill.runtime.launch import leave
from vlm_distill.trainer import Trainer


def forward_batch(self, step, micro, scales, real=Trainer.forward_batch):
    last = self.processes.rank == self.processes.world - 1
    if step.index == 2 and last and os.environ["BROKEN"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if step.index == 2 and last and os.environ["BROKEN"] == "full" and micro.samples > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return real(self, step, micro, scales)


if __name__ == "__main__":
    Trainer.forward_batch = forward_batch
    leave(train.main())
