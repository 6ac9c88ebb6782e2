"""How much noisier ``policy_gradient`` is than the exact reverse KL on the same drawn answers.

    python benchmarks/policy_gradient.py CONFIG [section.key=value ...] [--draws 32] [--output FILE.csv]

A run's student answers the questions of its first step again and again, at temperature 1. On each set of answers, the
gradient by the student's weights is computed by both losses from the same teacher. Noise is the gradients' variance
over sets, signal the squared length of their mean, both without bias; ``answers_for_one`` is how many answers make the
noise as large as the signal. The means' cosine shows that both losses aim at the same.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import DistillationBatch
from vlm_distill.config.file import load_config
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer

LOSSES = ("reverse_kl", "policy_gradient")


class Noise:
    """Of gradients ``[P]`` over sets of answers: their sum, and the sum of their squared lengths."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), 0.0

    def add(self, gradient: Tensor) -> None:
        """Count one set's gradient in."""
        self.count += 1
        self.total = self.total + gradient
        self.squares += float(gradient.square().sum(dtype=torch.float64))

    @property
    def variance(self) -> float:
        return (self.squares - self._squared_sum / self.count) / (self.count - 1)

    @property
    def signal(self) -> float:
        """Squared length of the mean, without the mean's own noise."""
        return self._squared_sum / self.count**2 - self.variance / self.count

    @property
    def _squared_sum(self) -> float:
        return float(self.total.square().sum(dtype=torch.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--draws", type=int, default=32, help="sets of answers")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    processes = Processes("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        trainers = [trainer(options, Path(temporary) / name, name, processes) for name in LOSSES]
        exact, sampled = Noise(), Noise()
        answers = tokens = 0
        for draw in range(options.draws):
            batches = drawn(trainers[0], draw)
            answers += sum(batch.samples for batch in batches)
            tokens += sum(len(batch.targets) for batch in batches)
            for own, found in zip(trainers, (exact, sampled), strict=True):
                found.add(gradient(own, batches))
    processes.close()

    cosine = float(torch.nn.functional.cosine_similarity(exact.total, sampled.total, dim=0))
    rows = []
    for name, found in zip(LOSSES, (exact, sampled), strict=True):
        row = {
            "loss": name,
            "answers": answers // options.draws,
            "tokens_an_answer": round(tokens / answers, 1),
            "draws": options.draws,
            "noise_over_signal": round(found.variance / found.signal, 2),
            "noise_over_exact": round(found.variance / exact.variance, 2),
            "answers_for_one": math.ceil(answers / options.draws * found.variance / found.signal),
            "cosine_of_means": round(cosine, 3),
        }
        print(row, flush=True)
        rows.append(row)
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def trainer(options: argparse.Namespace, folder: Path, loss: str, processes: Processes) -> Trainer:
    """Return the run with one of the losses, on its own answers alone."""
    changes = [f"loss=[{{name: {loss}}}]", "on_policy.fraction=1.0", "on_policy.temperature=1.0", f"output={folder}"]
    changes.append("deepspeed.stage=0")  # gradients stay with their parameters
    config = load_config(options.config, [*options.overrides, *changes])
    return Trainer(config, processes)


def drawn(trainer: Trainer, draw: int) -> Sequence[DistillationBatch]:
    """Return the first step's questions with newly drawn answers."""
    assert trainer.on_policy is not None
    trainer.on_policy.seed = draw
    return trainer.on_policy.prepare_step(trainer.dataset[0]).batches


def gradient(trainer: Trainer, batches: Sequence[DistillationBatch]) -> Tensor:
    """Return the gradient ``[P]`` of the mean loss of a token by all weights that train."""
    trained = [parameter for parameter in trainer.student.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = None
    task: Any = trainer.engine.task
    for batch in batches:
        loss, _ = task(batch, trainer.loss_teacher.outputs(batch, trainer.features))
        loss.backward()
    count = sum(len(batch.targets) for batch in batches)
    return torch.cat([parameter.grad.flatten() for parameter in trained if parameter.grad is not None]) / count


if __name__ == "__main__":
    main()
