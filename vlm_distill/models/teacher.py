"""Teacher: what a loss learns from, wherever it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.batch import DistillationBatch
from vlm_distill.losses import HiddenTargets, TopKTargets

from .interface import Outputs, Processor, VisionLanguageModel


@dataclass
class TeacherOutputs:
    """A teacher's side of a micro-batch: what the losses on logits learn from, and its features by name."""

    targets: HiddenTargets | TopKTargets
    features: dict[str, Tensor] = field(default_factory=dict)


class Teacher(ABC):
    """Gives targets for a micro-batch. It is never trained, and never part of a checkpoint.

    Attributes:
        processor: turns conversations into the teacher's own inputs.
        needs_images: whether it reads conversations with images from ``batch.conversations``, not from tokens.
    """

    processor: Processor
    needs_images: bool = False

    @property
    def end_tokens(self) -> set[int]:
        """Ids that end an answer."""
        eos = self.processor.tokenizer.eos_token_id
        return set() if eos is None else {eos}

    @abstractmethod
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        """What the losses learn from at the positions of ``batch.teacher``.

        Hidden states ``[N, H]`` with the head that makes logits of them, or the likeliest tokens alone.

        Args:
            batch: on this rank's device.
            features: names of further activations, as in ``VisionLanguageModel.forward``.
        """


class ModelTeacher(Teacher):
    """A model that runs here, whole on this rank or in shards.

    Args:
        model: frozen and in evaluation mode from here on.
        run: calls the model; an engine's call where the parameters are sharded (default: the model itself).
    """

    def __init__(self, model: VisionLanguageModel, run: Callable[..., Any] | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = model.processor
        self._run = run or model

    @property
    def end_tokens(self) -> set[int]:
        return self.model.end_tokens

    # Not inference_mode: its tensors cannot be saved for the student's backward.
    @torch.no_grad()
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        assert batch.teacher is not None
        inputs = batch.teacher.inputs.to(batch.targets.device, self.model.dtype)
        outputs: Outputs = self._run(inputs, batch.teacher.positions, features)
        return TeacherOutputs(HiddenTargets(outputs.hidden, self.model.head), outputs.features)
