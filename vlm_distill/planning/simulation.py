"""A micro-batch of a run computed without weights: which bytes are alive at once, and how many operations it takes.

The model's own code runs, forward and backward, activation checkpointing included; only the numbers are missing. What
of the output layer is computed in chunks is the exception: its buffers and operations follow from their definition.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from data.batch import DistillationBatch, ModelInputs
from vlm_distill.losses import HiddenTargets, Term, TopKTargets, fused_linear
from vlm_distill.losses.fused_linear import BLOCK_BYTES_CPU, CHUNK_BYTES, CHUNK_BYTES_CPU
from vlm_distill.losses.tiles import TILE_BYTES, TILE_BYTES_CPU
from vlm_distill.models.decoder_features import VISION_FEATURES
from vlm_distill.models.interface import Outputs, VisionLanguageModel
from vlm_distill.models.lm_head import LMHead
from vlm_distill.models.shared_vision import with_vision_features
from vlm_distill.models.weightless import Weightless, tensors_in

aten = torch.ops.aten


class Meter(Weightless):
    """Counts floating-point operations of everything computed while it is open, and bytes alive while it is told to.

    Attributes:
        flops: two for each multiplication with addition, in matrix products, convolutions and attention.
        live, peak: bytes of tensors made since :meth:`counting` began that are alive, and the most of them at once.
        gradients: bytes among these that are parameters' gradients.
        passing: the most of what is alive beside parameters' gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = self.gradients = self.passing = 0
        self._counting = False
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, from nothing, bytes and operations are counted."""
        self.flops = self.live = self.peak = self.gradients = self.passing = 0
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, fake = self.compute(func, args, kwargs)
        if self._counting:
            # Views and what is written in place share a storage that is known, or one that was there before.
            given = {id(x.untyped_storage()) for x in tensors_in((args, kwargs))}
            for tensor in tensors_in(result):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._add(storage)
            if fake:
                self.flops += _flops(func, args, kwargs, result)
        return result

    def _add(self, storage: Any) -> None:
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self.passing = max(self.passing, self.live - self.gradients)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    packet = func._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = args[:3]
        return sdpa_flop_count(query.shape, key.shape, value.shape)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        outer, query, key, value = args[:4]
        return sdpa_backward_flop_count(outer.shape, query.shape, key.shape, value.shape)
    if packet is aten._grouped_mm:
        return 2 * args[0].numel() * args[1].shape[-1]
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return 0


@dataclass(frozen=True)
class HeadCost:
    """What the losses hold beside their gradients, and how much they multiply.

    Attributes:
        transient: bytes while the losses are computed.
        flops: of all products of both heads.
    """

    transient: int
    flops: int


def losses_cost(
    meter: Meter,
    terms: Sequence[Term],
    heads: Sequence[tuple[LMHead, int]],
    *,
    likeliest: int | None,
    grouped: bool,
    recompute: bool,
    on_cpu: bool,
) -> HeadCost:
    """What ``fused_linear`` holds and multiplies.

    Args:
        meter: open, and what the models were built under.
        terms: of the run.
        heads: the student's, and the teacher's where it guides, with the rows of hidden states that go through.
        likeliest: how many of the teacher's likeliest tokens are known, where no more is.
        grouped: rows are grouped across tokenizers.
        recompute: from tiles of tokens × vocabulary.
        on_cpu: its limits are a CPU's.
    """
    rows = heads[0][1]
    if not terms or not rows:
        return HeadCost(0, 0)
    weights = []
    for head, _ in heads:
        with head.weight() as weight:
            weights.append(weight)
    flops = 2 * rows * weights[0].numel() * (2 + weights[0].requires_grad)
    flops += sum(2 * count * w.numel() for w, (_, count) in zip(weights[1:], heads[1:], strict=True))
    logits = sum(4 * count * len(w) for w, (_, count) in zip(weights, heads, strict=True))
    if not on_cpu:
        return HeadCost(min(2 * logits, TILE_BYTES if recompute else CHUNK_BYTES), flops)
    copies = sum(4 * w.numel() for w in weights if w.dtype != torch.float32)
    if recompute:
        return HeadCost(copies + min(logits, TILE_BYTES_CPU), flops)
    block = 8 * BLOCK_BYTES_CPU if grouped else _block(meter, terms, heads, weights, likeliest)
    return HeadCost(copies + min(logits + block, CHUNK_BYTES_CPU), flops)


def _block(
    meter: Meter,
    terms: Sequence[Term],
    heads: Sequence[tuple[LMHead, int]],
    weights: Sequence[Tensor],
    likeliest: int | None,
) -> int:
    """Bytes that the losses hold for a block of rows, its logits aside, found by letting them run on one."""
    rows = min(heads[0][1], max(1, BLOCK_BYTES_CPU // (4 * len(weights[0]))))
    hidden = [w.new_empty(rows, w.shape[1]) for w in weights]
    hidden[0].requires_grad_()
    targets = torch.zeros(rows, dtype=torch.int64)
    teacher: HiddenTargets | TopKTargets | None = None
    if len(heads) > 1:
        teacher = HiddenTargets(hidden[1], heads[1][0])
    elif likeliest is not None:
        ids = torch.arange(likeliest).expand(rows, -1)
        teacher = TopKTargets(ids, hidden[0].new_empty(ids.shape), hidden[0].new_empty(rows))
    with meter.counting():
        fused_linear(terms, hidden[0], heads[0][0], teacher, targets)
    made = sum(4 * rows * len(w) + (4 * w.numel() if w.dtype != torch.float32 else 0) for w in weights)
    gradients = 4 * hidden[0].numel() + (4 * weights[0].numel() if weights[0].requires_grad else 0)
    return max(0, meter.peak - made - gradients)


class _Losses(torch.autograd.Function):
    """In place of the losses: their buffers, and gradients of the right shapes, made in float32 and cast once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, transient: int) -> Tensor:
        wanted = [x for x in (hidden, weight) if x.requires_grad]
        accumulated = [torch.empty_like(x, dtype=torch.float32) for x in wanted]
        buffers = hidden.new_empty(transient, dtype=torch.uint8)
        ctx.save_for_backward(*(made.to(x.dtype) for made, x in zip(accumulated, wanted, strict=True)))
        ctx.wanted = hidden.requires_grad, weight.requires_grad
        del buffers
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        made = iter(ctx.saved_tensors)
        return *((torch.empty_like(next(made)) if wanted else None) for wanted in ctx.wanted), None


@dataclass(frozen=True)
class Micro:
    """A micro-batch, measured.

    Attributes:
        teacher: bytes alive at the teacher's peak, the micro-batch itself among them as in all of these.
        student: bytes alive at the peak of the student's forward, losses and backward, where each gradient goes as soon
            as it is made.
        keeping: the same where gradients stay.
        student_flops, teacher_flops: forward, and backward of what trains, recomputation included; both heads are the
            student's.
    """

    teacher: int
    student: int
    keeping: int
    student_flops: int
    teacher_flops: int


def simulate(
    meter: Meter,
    student: VisionLanguageModel,
    teacher: VisionLanguageModel | None,
    batch: DistillationBatch,
    head: HeadCost,
    *,
    autocast: bool,
    cached: int = 0,
    shared_vision: bool = False,
) -> Micro:
    """Runs a micro-batch without weights.

    Args:
        meter: open, and what the models were built under.
        student, teacher: what they are in training.
        batch: of real token ids, masks and positions.
        head: what the losses take.
        autocast: the student computes in bf16 from float32 parameters.
        cached: bytes of what is read from disk in place of a teacher's outputs.
        shared_vision: the student takes what the teacher saw.
    """
    inputs = _bytes(batch)
    kept, teacher_peak, teacher_flops = cached, 0, 0
    given = batch.student.inputs
    if teacher is not None and batch.teacher is not None:
        with meter.counting(), torch.no_grad():
            wanted = [VISION_FEATURES] if shared_vision else []
            taught = _forward(teacher, batch.teacher.inputs, batch.teacher.positions, wanted, autocast=False)
        teacher_peak, teacher_flops = meter.peak, meter.flops
        kept = taught.hidden.nbytes + sum(t.nbytes for t in taught.features.values())
    with meter.counting(), _gradients(meter, student):
        if shared_vision:
            given = with_vision_features(batch, taught.features[VISION_FEATURES])
        states = _forward(student, given, batch.student.positions, autocast=autocast).hidden
        with student.head.weight() as weight:
            loss = _Losses.apply(states, weight, head.transient)
        del states, weight, given
        loss.backward()
        del loss
    student.zero_grad(set_to_none=True)
    return Micro(
        teacher=teacher_peak + inputs,
        student=meter.passing + kept + inputs,
        keeping=meter.peak + kept + inputs,
        student_flops=meter.flops + head.flops,
        teacher_flops=teacher_flops,
    )


def _forward(
    model: VisionLanguageModel, inputs: ModelInputs, positions: Tensor, features: Sequence[str] = (), *, autocast: bool
) -> Outputs:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(inputs.to("cpu", model.dtype), positions, features)


@contextmanager
def _gradients(meter: Meter, model: nn.Module) -> Iterator[None]:
    """Inside, the meter knows which bytes are gradients that are complete."""

    def made(parameter: Tensor) -> None:
        assert parameter.grad is not None
        meter.gradients += parameter.grad.nbytes

    hooks = [p.register_post_accumulate_grad_hook(made) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _bytes(batch: DistillationBatch) -> int:
    rows = [batch.student] + ([batch.teacher] if batch.teacher is not None else [])
    tensors = [t for side in rows for t in (*side.inputs.values(), side.positions)]
    return sum(t.nbytes for t in [*tensors, batch.targets, batch.distilled])
