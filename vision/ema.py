"""An exponential moving average of a student's weights, which is then the student that is evaluated and exported."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3

from .classifier import Classifier


class Average(ModelEmaV3):
    """timm's average of weights and batch-norm statistics, ``a ← d·a + (1 − d)·w`` after each optimizer step.

    The decay grows with the steps, min(d, (1 + s)/(10 + s)) after s of them, as in TensorFlow's
    ``ExponentialMovingAverage`` with ``num_updates``: the average soon forgets the untrained weights.

    Args:
        student: whose weights are averaged; on its device already, not yet in an engine.
        decay: d.

    Attributes:
        module: a classifier with the averaged weights.
    """

    _FILE = "ema.safetensors"

    def __init__(self, student: Classifier, decay: float) -> None:
        super().__init__(student, decay)
        self.module.requires_grad_(False)

    def get_decay(self, step: int | None = None) -> float:
        """Return the decay after optimizer step ``step``, counted from 0."""
        return self.decay if step is None else min(self.decay, (1 + step) / (10 + step))

    def save(self, folder: Path) -> None:
        """Write the averaged weights into a checkpoint."""
        save_file({name: t.contiguous() for name, t in self.module.state_dict().items()}, folder / self._FILE)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        self.module.load_state_dict(load_file(folder / self._FILE))
