"""How many floating-point operations a step takes, by parameters and tokens alone, and their share of a GPU's peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from data.batch import DistillationBatch, Rows
from vlm_distill.devices import known_device
from vlm_distill.models.initialise import size_of
from vlm_distill.models.interface import LMHead, VisionLanguageModel


class Operations:
    """Counts a run's model operations: two for each weight and token forward, as many for each gradient that is made.

    Attention's products are counted whole, as if no mask were there; of experts those that a token is sent to. What
    activation checkpointing computes again is not counted, as is usual for MFU; nor is attention inside the vision
    encoder. A convolutional one's operations are not known, and left out.

    Args:
        student: with what trains of it marked, before any sharding.
        teacher: the model that teaches, if one runs.
        device: of this rank.
        bf16: whether matrix products are in bfloat16.
        vision_once: what the student sees with does not run, its teacher's does.
        head: of a teacher of whom nothing else runs.
    """

    def __init__(
        self,
        student: VisionLanguageModel,
        teacher: VisionLanguageModel | None,
        device: torch.device,
        *,
        bf16: bool,
        vision_once: bool = False,
        head: LMHead | None = None,
    ) -> None:
        self._student = _Costs(student, trains=True)
        if vision_once:
            self._student.encoder = 0.0
            self._student.projector *= "projector" not in student.sight
        self._teacher = None if teacher is None else _Costs(teacher, trains=False)
        self._head = 0 if head is None else 2 * _size(head.parameters[:1])
        found = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = None if found is None else found.bf16 if bf16 else found.fp32

    def of(self, batch: DistillationBatch) -> float:
        """Operations of a micro-batch: student forward and backward, teacher forward, both heads."""
        total = self._student.of(batch.student)
        if batch.teacher is not None:
            total += len(batch.teacher.positions) * self._head
            total += 0 if self._teacher is None else self._teacher.of(batch.teacher)
        return total

    def values(self, flops: float, seconds: float, world: int) -> dict[str, float]:
        """``flops``, ``flops_per_second`` of all ranks and, on a known GPU, ``mfu``: their share of its peak."""
        found = {"flops": flops, "flops_per_second": flops / seconds}
        return found if self._peak is None else found | {"mfu": flops / seconds / (world * self._peak)}


class _Costs:
    """One model's operations, for each kind of its tokens."""

    def __init__(self, model: VisionLanguageModel, *, trains: bool) -> None:
        head = {id(p) for p in model.head.parameters}
        routed, flows = _routed(model), False
        self.text = self.encoder = self.projector = self.pair = self.patch = 0.0
        for name, part in model.parts.items():
            looked_up = {id(p) for m in part.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
            weights = [p for p in part.parameters() if id(p) not in head | looked_up]
            count, trained = _size(weights, routed), 0.0
            if trains:
                trained = _size([p for p in weights if p.requires_grad], routed)
            flows = flows or trained > 0 or (trains and any(p.requires_grad for p in part.parameters()))
            # Forward, the gradient that flows through, and those of the weights that train.
            forms = 2 * ((2 if flows else 1) * count + trained)
            if name == "decoder":
                module: Any = next(m for m in part.modules() if hasattr(m, "config"))
                config = module.config.get_text_config()
                heads = config.num_attention_heads
                width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
                self.text, self.pair = forms, 4 * (3 if flows else 1) * config.num_hidden_layers * width
            elif name == "vision_encoder":
                self.encoder = forms
            else:
                self.projector = forms
        parameters = model.head.parameters
        self.head = 2 * _size(parameters[:1]) * ((2 + parameters[0].requires_grad) if trains else 1)
        encoder = model.parts.get("vision_encoder")
        first: Any = None if encoder is None else next((m for m in encoder.modules() if hasattr(m, "weight")), None)
        # A patch's numbers: what one row of the patch embedding multiplies. Convolutional nets' windows overlap.
        if isinstance(first, nn.Conv2d | nn.Conv3d) and first.stride == first.kernel_size:
            self.patch = first.in_channels * torch.Size(first.kernel_size).numel()
        elif isinstance(first, nn.Linear):
            self.patch = first.in_features

    def of(self, rows: Rows) -> float:
        tokens = rows.inputs["input_ids"]
        total = tokens.numel() * (self.text + self.pair * tokens.shape[1]) + len(rows.positions) * self.head
        pixels = rows.inputs.get("pixel_values")
        if pixels is not None and self.patch:
            total += pixels.numel() / self.patch * (self.encoder + self.projector)
        features = rows.inputs.get("vision_features")  # the encoder has run long ago
        if features is not None and features.dim() == 3:  # and the projector has where they are rows
            total += features.shape[0] * features.shape[1] * self.projector
        return total


def _routed(model: VisionLanguageModel) -> dict[int, float]:
    """The share of experts' weights, by their ids, that a token meets: a router chooses some experts for it."""
    body: Any = model.body
    chosen = getattr(body.config.get_text_config(), "num_experts_per_tok", None)
    layers = [module for module in body.modules() if isinstance(getattr(module, "num_experts", None), int)]
    return {
        id(p): chosen / int(module.num_experts)
        for module in layers
        for p in module.parameters(recurse=False)
        if chosen and p.ndim == 3
    }


def _size(parameters: list[nn.Parameter], shares: Mapping[int, float] | None = None) -> float:
    return sum(size_of(p) * (shares or {}).get(id(p), 1.0) for p in parameters)
