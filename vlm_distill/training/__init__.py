"""The loop that trains a student, on any number of processes."""

import os

import torch

if not torch.cuda.is_available():
    # Before DeepSpeed is imported, which else looks for accelerators and warns in every process that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
