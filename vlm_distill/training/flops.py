"""Floating-point operations of a step, from numbers of parameters and positions, and their share of a GPU's peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from data.batch import DistillationBatch, ModelBatch
from vlm_distill.models.common import size_of
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.lm_head import LMHead
from vlm_distill.models.projectors import Projector
from vlm_distill.runtime.devices import known_device


class StepFlops:
    """Counts the operations of a run's models: two per weight and position forward, and two for each gradient.

    A position is where the weight's part computes: a patch in the vision encoder, a token that the projector makes of
    patches, a token in the decoder. Attention's products are counted without a mask, and not at all in layers of linear
    attention; of experts, those count that a token is sent to. As usual for MFU, the recomputation of activation
    checkpointing is not counted; nor is attention inside the vision encoder and the projector. An encoder whose layers
    differ in their positions, such as a convolutional one, is left out, since its operations are unknown.

    Args:
        student: with its trained parts marked, before any sharding.
        teacher: the teacher's model, if it runs.
        device: of this rank.
        bf16: whether matrix products are in bfloat16.
        shared_vision: whether the student reuses what the teacher's vision encoder gives.
        head: of a teacher whose head alone runs, on hidden states from a cache or a server.
        at_images: whether losses on logits also compare the image tokens.
        several: by name the models of several teachers that run.
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
        at_images: bool = False,
        several: Mapping[str, VisionLanguageModel] | None = None,
    ) -> None:
        self._at_images = at_images
        self._student = ModelFlops(student, trains=True)
        if shared_vision:
            self._student.per_position |= dict.fromkeys(student.image_parts, 0.0)
        self._teacher = None if teacher is None else ModelFlops(teacher, trains=False)
        self._several = {name: ModelFlops(model, trains=False) for name, model in (several or {}).items()}
        self._head = 0 if head is None else 2 * _size(head.parameters[:1])
        self._peak = _peak(device, bf16)

    def count(self, batch: DistillationBatch) -> float:
        """Return a micro-batch's operations: student forward and backward, teacher forward, both heads."""
        total = sum(self._student.count(batch.student).values())
        if batch.teacher is not None:
            total += len(batch.teacher.positions) * self._head
            total += 0 if self._teacher is None else sum(self._teacher.count(batch.teacher).values())
        for name, own in batch.taught.items():
            total += sum(self._several[name].count(own.student).values()) if name in self._several else 0
        if self._at_images and batch.teacher is not None:
            head = self._head if self._teacher is None else self._teacher.head
            total += len(batch.student.image_positions) * self._student.head
            total += len(batch.teacher.image_positions) * head
        return total

    def metrics(self, flops: float, seconds: float, world: int) -> dict[str, float]:
        """Return ``flops``, ``flops_per_second`` of all ranks and, on a known GPU, ``mfu``: their share of its peak."""
        found = {"flops": flops, "flops_per_second": flops / seconds}
        return found if self._peak is None else found | {"mfu": flops / seconds / (world * self._peak)}


class ModelFlops:
    """One model's operations by part.

    Args:
        model: before any sharding.
        trains: whether a backward follows.

    Attributes:
        per_position: operations of each part at one of its positions.
        per_pair: operations of the decoder's attention for one pair of tokens.
        head: operations of the lm head at one position.
    """

    def __init__(self, model: VisionLanguageModel, *, trains: bool) -> None:
        self.model = model
        head = {id(p) for p in model.head.parameters}
        shares, gradient_flows = _routed(model) | _reused(model), False
        self.per_position = {"vision_encoder": 0.0, "projector": 0.0, "decoder": 0.0}
        for name, part in model.parts.items():
            embeddings = [module for module in part.modules() if isinstance(module, nn.Embedding)]
            looked_up = {id(p) for module in embeddings for p in module.parameters()}
            weights = [p for p in part.parameters() if id(p) not in head | looked_up]
            count, trained = _size(weights, shares), 0.0
            if trains:
                trained = _size([p for p in weights if p.requires_grad], shares)
                gradient_flows = gradient_flows or trained > 0 or any(p.requires_grad for p in part.parameters())
            # The forward, the gradient that flows through, and the gradients of trained weights.
            self.per_position[name] = 2 * ((2 if gradient_flows else 1) * count + trained)
            if name == "decoder":
                self.per_pair = 4 * (3 if gradient_flows else 1) * _attention_width(part)
        weight = model.head.parameters[0]
        self.head = 2 * _size([weight]) * ((2 + weight.requires_grad) if trains else 1)

    def count(self, batch: ModelBatch) -> dict[str, float]:
        """Return a micro-batch's operations by part; ``attention`` is the decoder's, and ``lm_head`` apart."""
        tokens = batch.inputs["input_ids"]
        positions = {**self.model.vision_positions(batch.inputs), "decoder": tokens.numel()}
        return {
            **{name: positions[name] * self.per_position[name] for name in self.per_position},
            "attention": tokens.numel() * tokens.shape[1] * self.per_pair,
            "lm_head": len(batch.positions) * self.head,
        }


def _peak(device: torch.device, bf16: bool) -> float | None:
    """Return the peak operations per second of a known GPU."""
    found = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if found is None:
        return None
    return found.bf16 if bf16 else found.fp32


def _attention_width(decoder: nn.Module) -> int:
    """Return the width of the heads of all layers in which every token meets every other."""
    module: Any = next(m for m in decoder.modules() if hasattr(m, "config"))
    config = module.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    # Linear attention keeps a state instead.
    return sum(kind != "linear_attention" for kind in kinds) * width


def _reused(model: VisionLanguageModel) -> dict[int, float]:
    """Return how often each of the projector's weights is used per position, by the weights' ids."""
    projector = model.parts.get("projector")
    return projector.uses() if isinstance(projector, Projector) else {}


def _routed(model: VisionLanguageModel) -> dict[int, float]:
    """Return the share of experts that a token is sent to, by the ids of the experts' weights."""
    body: Any = model.body
    chosen = getattr(body.config.get_text_config(), "num_experts_per_tok", None)
    if not chosen:
        return {}
    shares: dict[int, float] = {}
    for module in body.modules():
        if not isinstance(getattr(module, "num_experts", None), int):
            continue
        stacked = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        shares |= {id(p): chosen / module.num_experts for p in stacked}
    return shares


def _size(parameters: list[nn.Parameter], shares: Mapping[int, float] | None = None) -> float:
    return sum(size_of(p) * (shares or {}).get(id(p), 1.0) for p in parameters)
