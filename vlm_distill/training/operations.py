"""Floating-point operations of a step, by parameters and positions alone, and their share of a GPU's peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from data.batch import DistillationBatch, ModelBatch
from vlm_distill.models.initialise import size_of
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.lm_head import LMHead
from vlm_distill.models.projectors import Projector
from vlm_distill.runtime.devices import known_device


class Operations:
    """Counts a run's model operations: two for each weight and position forward, as many for each gradient made.

    A position is one that the weight's part computes at: a patch in the vision encoder, what becomes of patches that
    were joined in the projector, a token in the decoder. Attention's products are counted whole, as if no mask were
    there, and not at all in layers of linear attention; of experts those that a token is sent to. What activation
    checkpointing computes again is not counted, as is usual for MFU; nor is attention inside the vision encoder and the
    projector. The operations of an encoder whose layers differ in their positions, as a convolutional one's do, are not
    known, and left out.

    Args:
        student: with what trains of it marked, before any sharding.
        teacher: the model that teaches, if one runs.
        device: of this rank.
        bf16: whether matrix products are in bfloat16.
        shared_vision: what the student sees with does not run, its teacher's does.
        head: of a teacher of whom nothing else runs.
    """

    def __init__(
        self,
        student: VisionLanguageModel,
        teacher: VisionLanguageModel | None,
        device: torch.device,
        *,
        bf16: bool,
        shared_vision: bool = False,
        head: LMHead | None = None,
    ) -> None:
        self._student = Costs(student, trains=True)
        if shared_vision:
            self._student.at |= dict.fromkeys(student.image_parts, 0.0)
        self._teacher = None if teacher is None else Costs(teacher, trains=False)
        self._head = 0 if head is None else 2 * _size(head.parameters[:1])
        found = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = None if found is None else found.bf16 if bf16 else found.fp32

    def of(self, batch: DistillationBatch) -> float:
        """Operations of a micro-batch: student forward and backward, teacher forward, both heads."""
        total = sum(self._student.of(batch.student).values())
        if batch.teacher is not None:
            total += len(batch.teacher.positions) * self._head
            total += 0 if self._teacher is None else sum(self._teacher.of(batch.teacher).values())
        return total

    def metrics(self, flops: float, seconds: float, world: int) -> dict[str, float]:
        """``flops``, ``flops_per_second`` of all ranks and, on a known GPU, ``mfu``: their share of its peak."""
        found = {"flops": flops, "flops_per_second": flops / seconds}
        return found if self._peak is None else found | {"mfu": flops / seconds / (world * self._peak)}


class Costs:
    """One model's operations, for each position of its parts.

    Args:
        model: before any sharding.
        trains: whether a backward follows.
    """

    def __init__(self, model: VisionLanguageModel, *, trains: bool) -> None:
        self.model = model
        head = {id(p) for p in model.head.parameters}
        uses, flows = _routed(model) | _used(model), False
        #: Of a part at one of its positions.
        self.at = {"vision_encoder": 0.0, "projector": 0.0, "decoder": 0.0}
        for name, part in model.parts.items():
            looked_up = {id(p) for m in part.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
            weights = [p for p in part.parameters() if id(p) not in head | looked_up]
            count, trained = _size(weights, uses), 0.0
            if trains:
                trained = _size([p for p in weights if p.requires_grad], uses)
            flows = flows or trained > 0 or (trains and any(p.requires_grad for p in part.parameters()))
            # Forward, the gradient that flows through, and those of the weights that train.
            self.at[name] = 2 * ((2 if flows else 1) * count + trained)
            if name == "decoder":
                module: Any = next(m for m in part.modules() if hasattr(m, "config"))
                config = module.config.get_text_config()
                heads = config.num_attention_heads
                width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
                kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
                # Linear attention keeps a state: no token is multiplied by every other.
                layers = sum(kind != "linear_attention" for kind in kinds)
                self.pair = 4 * (3 if flows else 1) * layers * width
        parameters = model.head.parameters
        self.head = 2 * _size(parameters[:1]) * ((2 + parameters[0].requires_grad) if trains else 1)

    def of(self, rows: ModelBatch) -> dict[str, float]:
        """Operations of a micro-batch by part, ``attention`` of the decoder and ``lm_head`` among them."""
        tokens = rows.inputs["input_ids"]
        positions = {**self.model.vision_positions(rows.inputs), "decoder": tokens.numel()}
        return {
            **{name: positions[name] * self.at[name] for name in self.at},
            "attention": tokens.numel() * tokens.shape[1] * self.pair,
            "lm_head": len(rows.positions) * self.head,
        }


def _used(model: VisionLanguageModel) -> dict[int, float]:
    projector = model.parts.get("projector")
    return projector.uses() if isinstance(projector, Projector) else {}


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
