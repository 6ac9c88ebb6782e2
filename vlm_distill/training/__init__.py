"""The loop that trains a student, on any number of processes."""

from vlm_distill.runtime.launch import settle_accelerator

settle_accelerator()
