"""Simulation of a micro-batch without weights: the bytes alive at once, and the floating-point operations.

The model's own code runs, forward and backward, with activation checkpointing; only the values are missing. The one
exception is the lm head with the losses, which is computed in chunks: its cost follows from the chunks' definition.
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

from data.batch import DistillationBatch, ModelBatch, ModelInputs
from vlm_distill.losses import IMAGE_HIDDEN, HiddenTargets, Term, TokenTargets, TopKTargets, fused_linear
from vlm_distill.losses.chunks import BLOCK_BYTES_CPU, CHUNK_BYTES, CHUNK_BYTES_CPU
from vlm_distill.losses.tiles import TILE_BYTES, TILE_BYTES_CPU
from vlm_distill.models.decoder_features import VISION_FEATURES
from vlm_distill.models.image_hidden import run_at_positions
from vlm_distill.models.interface import Outputs, VisionLanguageModel
from vlm_distill.models.lm_head import LMHead
from vlm_distill.models.shared_vision import with_vision_features
from vlm_distill.models.weightless import Weightless, tensors_in

aten = torch.ops.aten


class Meter(Weightless):
    """Measures what is computed without weights, inside :meth:`counting`.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention; a multiply-add counts as two.
        live: bytes of the tensors made since :meth:`counting` began that are alive.
        peak: the most bytes alive at once.
        gradients: bytes of parameters' gradients among those alive.
        passing: the most bytes alive at once beside parameters' gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = self.gradients = self.passing = 0
        self._counting = False
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Context manager: inside it, bytes and operations are counted from zero."""
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
            # Views and in-place results share a storage that is known, or one from before the counting.
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
    """Return the floating-point operations of one call of an operator."""
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
    """The cost of lm heads and losses.

    Attributes:
        transient: bytes of buffers while the losses are computed, gradients aside.
        flops: of all matrix products with both heads.
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
    """Compute the cost of ``fused_linear``.

    Args:
        meter: the open meter that the models were built under.
        terms: the run's losses on logits.
        heads: the student's head, and the teacher's if losses read its hidden states, with their numbers of positions.
        likeliest: how many of the teacher's likeliest tokens are known, if no more is; 0: only the answers' own.
        grouped: whether groups of tokens are compared across tokenizers.
        recompute: whether logits are recomputed in tiles of tokens × vocabulary.
        on_cpu: whether the limits of a CPU apply.
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
    """Return the bytes that the losses hold for a block of rows beside its logits, by running them on one."""
    rows = min(heads[0][1], max(1, BLOCK_BYTES_CPU // (4 * len(weights[0]))))
    hidden = [w.new_empty(rows, w.shape[1]) for w in weights]
    hidden[0].requires_grad_()
    targets = torch.zeros(rows, dtype=torch.int64)
    teacher: HiddenTargets | TopKTargets | TokenTargets | None = None
    if len(heads) > 1:
        teacher = HiddenTargets(hidden[1], heads[1][0])
    elif likeliest == 0:
        teacher = TokenTargets(hidden[0].new_empty(rows))
    elif likeliest is not None:
        ids = torch.arange(likeliest).expand(rows, -1)
        teacher = TopKTargets(ids, hidden[0].new_empty(ids.shape), hidden[0].new_empty(rows))
    with meter.counting():
        fused_linear(terms, hidden[0], heads[0][0], teacher, targets)
    made = sum(4 * rows * len(w) + (4 * w.numel() if w.dtype != torch.float32 else 0) for w in weights)
    gradients = 4 * hidden[0].numel() + (4 * weights[0].numel() if weights[0].requires_grad else 0)
    return max(0, meter.peak - made - gradients)


class _Losses(torch.autograd.Function):
    """Stands in for the losses: allocates their buffers, and gradients in float32 that are cast once."""

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
    """The cost of a micro-batch. All bytes include the micro-batch itself.

    Attributes:
        teacher: bytes alive at the peak of the teacher's forward.
        student: bytes alive at the peak of the student's forward, losses and backward, if each parameter's gradient is
            freed as soon as it is complete.
        keeping: the same if gradients are kept.
        student_flops: forward and backward, recomputation included, with the products of both heads.
        teacher_flops: forward, without the head.
    """

    teacher: int
    student: int
    keeping: int
    student_flops: int
    teacher_flops: int


def simulate(
    meter: Meter,
    student: VisionLanguageModel,
    teachers: VisionLanguageModel | Mapping[str, VisionLanguageModel] | None,
    batch: DistillationBatch,
    head: HeadCost,
    *,
    autocast: bool,
    cached: int = 0,
    shared_vision: bool = False,
    at_images: HeadCost | None = None,
) -> Micro:
    """Run a micro-batch without weights.

    Args:
        meter: the open meter that the models were built under.
        student: as in training.
        teachers: as in training; ``None`` if none runs. Several run each on its own samples.
        batch: with real token ids, masks and positions.
        head: cost of heads and losses.
        autocast: whether the student computes in bf16 from float32 parameters.
        cached: bytes of teacher outputs that are read from disk.
        shared_vision: whether the student reuses what the teacher's vision encoder gives.
        at_images: cost of heads and losses at image tokens, if losses compare these.
    """
    inputs = _bytes(batch)
    images = [] if at_images is None else [IMAGE_HIDDEN]
    # The teachers run first, and their outputs stay.
    kept, teacher_peak, teacher_flops = cached, 0, 0
    taught: dict[str, Tensor] = {}
    wanted = images + ([VISION_FEATURES] if shared_vision else [])
    for model, side in _taught_sides(teachers, batch):
        with meter.counting(), torch.no_grad():
            outputs = _forward(model, side.inputs, side, wanted, autocast=False)
        teacher_peak, teacher_flops = max(teacher_peak, kept + meter.peak), teacher_flops + meter.flops
        kept += outputs.hidden.nbytes + sum(feature.nbytes for feature in outputs.features.values())
        taught = outputs.features
    given = batch.student.inputs
    with meter.counting(), marked_gradients(meter, student):
        if shared_vision:
            given = with_vision_features(batch, taught[VISION_FEATURES])
        outputs = _forward(student, given, batch.student, images, autocast=autocast)
        with student.head.weight() as weight:
            loss = _Losses.apply(outputs.hidden, weight, head.transient)
            if at_images is not None:
                loss = loss + _Losses.apply(outputs.features[IMAGE_HIDDEN], weight, at_images.transient)
        del outputs, weight, given
        loss.backward()
        del loss
    student.zero_grad(set_to_none=True)
    return Micro(
        teacher=teacher_peak + inputs,
        student=meter.passing + kept + inputs,
        keeping=meter.peak + kept + inputs,
        student_flops=meter.flops + head.flops + (0 if at_images is None else at_images.flops),
        teacher_flops=teacher_flops,
    )


def _taught_sides(
    teachers: VisionLanguageModel | Mapping[str, VisionLanguageModel] | None, batch: DistillationBatch
) -> Iterator[tuple[VisionLanguageModel, ModelBatch]]:
    """Yield each teacher that runs, with its side of the micro-batch."""
    if isinstance(teachers, Mapping):
        for name, model in teachers.items():
            side = batch.taught[name].student
            if len(side.positions):
                yield model, side
    elif teachers is not None and batch.teacher is not None:
        yield teachers, batch.teacher


def _forward(
    model: VisionLanguageModel, inputs: ModelInputs, side: ModelBatch, features: Sequence[str] = (), *, autocast: bool
) -> Outputs:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return run_at_positions(model, inputs.to("cpu", model.dtype), side, features)


@contextmanager
def marked_gradients(meter: Meter, model: nn.Module) -> Iterator[None]:
    """Context manager: inside it, the meter knows which bytes are complete gradients."""

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
    rows += [own.student for own in batch.taught.values()]
    tensors = [t for side in rows for t in (*side.inputs.values(), side.positions)]
    return sum(t.nbytes for t in [*tensors, batch.targets, batch.distilled])
