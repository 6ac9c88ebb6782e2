"""Ranks of a training of which one breaks: ``BROKEN`` is ``full``, ``killed`` or ``straight``, of the environment."""

import os
import signal

import torch

from vlm_distill import train
from vlm_distill.launch import leave
from vlm_distill.training.trainer import Trainer


def learn(self, step, micro, scales, real=Trainer.learn):
    last = self.processes.rank == self.processes.world - 1
    if step.index == 2 and last and os.environ["BROKEN"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if step.index == 2 and last and os.environ["BROKEN"] == "full" and micro.samples > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return real(self, step, micro, scales)


if __name__ == "__main__":
    Trainer.learn = learn
    leave(train.main())
