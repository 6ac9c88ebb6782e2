"""Batches as Transformers' trainer takes them, made from those of our own loop."""

import torch

from data.batch import DistillationBatch
from vlm_distill.config.sections import RunConfig
from vlm_distill.run import Run


def batches(config, processes):
    """Return the batches of all steps of a run, in order, and its prepared parts."""
    run = Run(RunConfig.model_validate(config), processes)
    run.prepare()
    found = []
    for step in range(config["training"]["steps"]):
        found += [plain(batch) for batch in run.dataset[step].batches]
    return found, run


def plain(batch: DistillationBatch):
    """Return a micro-batch as inputs of the student with labels."""
    inputs = dict(batch.student.inputs)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels.view(-1)[batch.student.positions + 1] = batch.targets
    return {**inputs, "labels": labels}
