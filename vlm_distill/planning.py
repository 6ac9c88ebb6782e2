"""A run's cost before it is paid: parameters, memory by ZeRO stage and placement, operations, bytes read, time.

No weight is loaded. The models are built without numbers and a micro-batch of the run's own data goes through them,
forward and backward (``simulation``); what ZeRO holds beside that follows from its stage. docs/planning.md says what
is counted, and how far it was from what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from data.batch import Encoded
from data.collate import Collator, Pair
from data.conversation import Conversation, Document
from data.errors import BadSample, UserError
from data.mixture import Mixture
from vlm_distill.config import RunConfig, split_batch
from vlm_distill.devices import DEVICES
from vlm_distill.losses import HiddenTargets, Term, TopKTargets, fused_linear
from vlm_distill.losses.fused_linear import BLOCK_BYTES_CPU, CHUNK_BYTES, CHUNK_BYTES_CPU
from vlm_distill.losses.tiles import TILE_BYTES, TILE_BYTES_CPU
from vlm_distill.models.common import DTYPES, first_line
from vlm_distill.models.composed import ComposedVLM
from vlm_distill.models.interface import Processor, VisionLanguageModel
from vlm_distill.models.lora import WithoutAdapters
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.models.served import ServedTeacher
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.models.vision_once import sees_as
from vlm_distill.simulation import HeadCost, Meter, Micro, simulate
from vlm_distill.training.build import (
    build_terms,
    check_evaluations,
    check_packing,
    divide_sequences,
    image_loader,
    load_models,
    open_sources,
    pair_vocabularies,
    prepare_losses,
    turns,
)
from vlm_distill.training.on_policy import check_on_policy
from vlm_distill.training.packing import plan_packing
from vlm_distill.training.schedule import lr_scales, parameter_groups
from vlm_distill.training.teacher_cache import check_likeliest
from vlm_distill.training.vision_cache import sight_of

STAGES = (0, 1, 2, 3)
SAMPLES = 32
#: Share of a GPU's peak that a training is taken to reach.
UTILISATION = 0.35
#: Not of tensors: CUDA's context and kernels and NCCL's buffers, in bytes, and the share lost between blocks.
CONTEXT, FRAGMENTATION = 1.5e9, 0.05
#: DeepSpeed's defaults: elements of a bucket, and of ZeRO-3 parameters that are whole at once, fetched at once, and of
#: those that stay whole the first too large.
BUCKET, LIVE, PREFETCH, PERSISTENT = 500_000_000, 1_000_000_000, 50_000_000, 100_000
#: Bits of a quantised weight with its scales: one of 8 bits for 64 weights, and its own scale for 256 of these.
BITS = {"nf4": 4.127, "int8": 8.0, "fp8": 8.0}
#: The largest micro-batch that is looked for.
MOST = 4096
#: Micro-batches up to this are planned beside one of eight times their size.
_FAR = 16


@dataclass(frozen=True)
class Part:
    """One part of a model: numbers of parameters."""

    model: str
    name: str
    parameters: int
    trained: int


@dataclass(frozen=True)
class Sequences:
    """What samples look like, in the student's tokens.

    Attributes:
        sampled: how many samples were encoded; 0: there were no data, and every row is taken to be full.
        mean, p95, longest: tokens of a row.
        supervised: tokens of answers in a mean row.
        images: in a mean row.
        bytes: on disk of a mean sample's text and images; 0 where unknown.
    """

    sampled: int
    mean: float
    p95: int
    longest: int
    supervised: float
    images: float
    bytes: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank under one ZeRO stage and placement of the teacher, at one micro-batch.

    Attributes:
        parameters, optimizer, gradients: the student's during a forward, with float32 masters in ``optimizer``.
        teacher: its weights.
        buckets: more gradients at the end of a backward, in DeepSpeed's buckets or beside them.
        activations: alive at the peak of forward and backward, with the losses' buffers and the micro-batch.
        step: what the update holds for a moment.
        host: in main memory, where something is offloaded to it.
        peak: the most at once: in a forward and backward, at its end, or in the update. These are less than all above.
        largest_micro_batch: that fits beside the allowance; 0: none does.
    """

    stage: int
    placement: str
    micro_batch: int
    parameters: int
    optimizer: int
    gradients: int
    teacher: int
    buckets: int
    activations: int
    step: int
    host: int
    peak: int
    largest_micro_batch: int


@dataclass(frozen=True)
class Plan:
    """A run's cost.

    Attributes:
        configured: index in ``memory`` of what the configuration says.
        budget: bytes of a GPU; ``allowance``: of these, what is not tensors.
        flops: of an optimizer step, all ranks together.
        seconds: of the training on ``gpus``, evaluation and waiting for data not counted; ``None`` without a device.
        told: remarks on what is planned.
    """

    parts: tuple[Part, ...]
    sequences: Sequences
    memory: tuple[Memory, ...]
    configured: int
    gpus: int
    device: str
    budget: float
    allowance: float
    utilisation: float
    steps: int
    batch_size: int
    flops: float
    tokens: float
    bytes_read: float
    seconds: float | None
    told: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.gpus / 3600

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None else self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as ``plan.json`` has it."""
        return asdict(self) | {"gpu_hours": self.gpu_hours, "tokens_per_second": self.tokens_per_second}


def plan(config: RunConfig, *, gpus: int = 1, memory: float | None = None, device: str = "h100") -> Plan:
    """What a run will cost.

    Args:
        config: the run's.
        gpus: ranks.
        memory: of a GPU, in GB; default: the device's.
        device: of ``devices.DEVICES``, or ``cpu``.

    Raises:
        UserError: an unknown device, or a model whose configuration cannot be read.
    """
    if device not in {*DEVICES, "cpu"}:
        raise UserError(f"--device: {device} is not known; choose cpu or one of {', '.join(DEVICES)}")
    if device == "cpu" and memory is None:
        raise UserError("--memory: say how many GB a rank has on a cpu")
    budget = 1e9 * (memory or DEVICES[device].memory)
    allowance = 0.0 if device == "cpu" else CONTEXT + FRAGMENTATION * budget
    micro, accumulation = split_batch(config, gpus)
    with Meter() as meter:
        models = _Models(config, device)
        pairs, sequences, epoch_steps = _sample(config, models)
        longest = max(pairs, key=lambda pair: len(pair.student.input_ids))
        sizes = (micro, 8 * micro if micro <= _FAR else 1)
        points = {size: models.run(meter, [longest] * size) for size in sizes}
        typical = points[micro] if sequences.sampled == 0 else models.run(meter, (pairs * micro)[:micro])
    own, placements = models.placements()
    rows: list[Memory] = []
    configured = 0
    for placement in placements:
        for stage in STAGES:
            if stage == 3 and config.student.quantize is not None:
                continue  # which no run does
            if stage == config.deepspeed.stage and placement == own:
                configured = len(rows)
            rows.append(_memory(models, points, micro, stage, placement, gpus, accumulation, budget - allowance))
    steps = config.training.steps or math.ceil((config.training.epochs or 0) * epoch_steps)
    flops = float(typical.student_flops + typical.teacher_flops) * accumulation * gpus
    samples = steps * config.training.batch_size
    seconds = None
    if device != "cpu":
        speed = DEVICES[device].bf16 if config.training.dtype == "bf16" else DEVICES[device].fp32
        seconds = steps * flops / (gpus * speed * UTILISATION)
    return Plan(
        parts=models.parts(),
        sequences=sequences,
        memory=tuple(rows),
        configured=configured,
        gpus=gpus,
        device=device,
        budget=budget,
        allowance=allowance,
        utilisation=UTILISATION,
        steps=steps,
        batch_size=config.training.batch_size,
        flops=flops,
        tokens=samples * sequences.mean,
        bytes_read=samples * sequences.bytes,
        seconds=seconds,
        told=models.told,
    )


class _Models:
    """Student and teacher without weights, as the run would build them. To be made inside a ``Meter``."""

    def __init__(self, config: RunConfig, device: str) -> None:
        self.config, self.on_cpu = config, device == "cpu"
        self.terms = build_terms(config)
        check_on_policy(config, self.terms)
        section = config.teacher
        whole = section and section.model_copy(update={"placement": "replicate", "cache": None})
        here: Any = SimpleNamespace(device=torch.device("cpu"))
        self.student, teacher = load_models(config.model_copy(update={"teacher": whole}), here)
        self.teacher = teacher.model if isinstance(teacher, ModelTeacher) else None
        self.guides = teacher is not None and any("teacher" in term.loss.needs for term in self.terms)
        #: How many of its likeliest tokens are all that is known of the teacher, if they are.
        self.likeliest: int | None = None
        self.cache = None if section is None else section.cache
        self.grouped = self.teacher is not None and pair_vocabularies(config, self.student, self.teacher, self.terms)
        if isinstance(teacher, ServedTeacher):
            teacher.align(self.student)
            self.likeliest = teacher.top
        elif self.cache is not None and self.cache.form == "topk":
            check_likeliest(self.cache, self.student.head.vocabulary or 0)
            self.likeliest = self.cache.k
        prepare_losses(self.terms, self.student, teacher if self.guides else None)
        #: The teacher is the student's own base.
        self.shared = isinstance(self.teacher, WithoutAdapters)
        guide = self.teacher if self.guides and self.cache is None else None
        check_packing(config.data.train, self.student, guide, self.grouped)
        check_evaluations(config, self.student, self.teacher)
        scales = lr_scales(self.student.parts, config.optimizer.part_lr, config.optimizer.lr)
        groups = parameter_groups(self.student, config.optimizer.weight_decay, scales)
        bucket = config.deepspeed.zero.get("reduce_bucket_size")
        self.bucket = bucket if isinstance(bucket, int) else BUCKET
        #: Parameters that ZeRO-3 does not shard.
        self.small = sum(p.numel() for p in self.student.parameters() if p.numel() < PERSISTENT)
        #: Parameters that are updated at once, the most of them.
        self.group = max(_count(group["params"]) for group in groups)
        packing = plan_packing(config.data, self.student, guide)
        self.packed, self.told = packing.packed, packing.told
        if any(self.packed):
            self.told += ("rows are packed as if the models kept samples in one row apart, which the run tries",)
        if isinstance(teacher, ServedTeacher):
            self.told += ("the teacher's server and the time in which it answers are not planned",)
        if config.on_policy is not None:
            self.told += ("the time in which the student draws its answers is not planned",)
        #: The teacher sees as the student does, with frozen parts.
        self.same_encoder = (
            guide is not None
            and (section is None or section.placement == "replicate")
            and guide.dtype == DTYPES[config.training.dtype]
            and sees_as(self.student, guide)
        )
        features = config.student.vision_cache is not None
        self.vision_once = self.same_encoder and not features
        if self.vision_once or (self.same_encoder and features):
            runs = "does not run" if features else "runs once, for both"
            self.told += (f"the vision encoder is frozen and taken to be the teacher's: it {runs}",)
        self.cached_sight = features
        self._shapes: dict[tuple[tuple[int, int], ...], torch.Size] = {}
        #: What encodes samples, as in the run.
        own: Any = self.student.processor
        other: Any = teacher.processor if teacher is not None and self.guides else None
        if features:
            sight_of(self.student)  # refuses as the run would
            own = own.with_features(self._features)
            other = other.with_features(self._features) if self.same_encoder else other
        self.processors: tuple[Processor, Processor | None] = own, other
        ranks = config.training.sequence_parallel
        self.sequence = None if ranks == 1 else SequenceParallel(None, 0, ranks)
        if self.sequence is not None:
            divide_sequences(config, self.sequence, self.student, guide, self.terms, self.grouped)
            self.told += ("the decoders are taken to be ones that can be divided, which the run tries",)
        if config.training.activation_checkpointing:
            self.student.checkpoint_activations()
        bf16, stage = config.training.dtype == "bf16", config.deepspeed.stage
        self.bf16, self.autocast, self.deepspeed = bf16, bf16 and stage == 0, config.deepspeed
        self.trained = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        self.learned = sum(p.numel() for term in self.terms for p in term.loss.parameters())
        self.largest = max(p.numel() for p in self.student.parameters() if p.requires_grad)
        self.total = sum(p.numel() for p in self.student.parameters())
        if bf16 and not self.autocast:
            for parameter in self.student.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)

    def placements(self) -> tuple[str, list[str]]:
        """Where the teacher is, as configured and as it might be."""
        section = self.config.teacher
        if self.cache is not None:
            return "cached", ["cached"]
        if section is not None and section.server is not None:
            return "served", ["served"]
        if section is None or self.shared:
            return "none", ["none"]
        if section.quantize is not None:
            return section.quantize, ["replicate", section.quantize]
        return section.placement, list(dict.fromkeys(["replicate", "shard", section.placement]))

    def parts(self) -> tuple[Part, ...]:
        found = []
        for role, model in (("student", self.student), ("teacher", self.teacher)):
            if model is not None and role == "teacher" and self.cache is not None:
                found += [] if self.likeliest is not None else [Part(role, "lm_head", _count(model.head.parameters), 0)]
                continue
            if model is None or (role == "teacher" and self.shared):
                continue
            seen: set[int] = set()
            head = {id(p) for p in model.head.parameters}
            for name, part in model.parts.items():
                own = {id(p): p for p in part.parameters() if id(p) not in seen}
                seen |= set(own)
                tied = {id(p) for m in part.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
                split = {"lm_head": [p for i, p in own.items() if i in head - tied]}
                split = {name: [p for i, p in own.items() if i not in head - tied]} | split
                found += [
                    Part(role, what, _count(ps), _count([p for p in ps if p.requires_grad]))
                    for what, ps in split.items()
                    if ps
                ]
        return tuple(found)

    def parameter_bytes(self, stage: int) -> float:
        """The student's working copy, whole."""
        size = 2 if self.bf16 and stage > 0 else 4
        kind = self.config.student.quantize
        if kind is None:
            return self.total * size
        packed = _count(_quantised(self.student))
        return (self.total - packed) * size + packed * BITS[kind] / 8

    def teacher_bytes(self, placement: str, stage: int) -> float:
        """Its weights, whole, but for those that lie where the student's do, which sees as it does."""
        if self.teacher is None or placement == "none":
            return 0.0
        if placement == "cached":
            return 0.0 if self.likeliest is not None else sum(p.nbytes for p in self.teacher.head.parameters)
        whole = sum(p.nbytes for p in self.teacher.parameters())
        if placement == "replicate" and self.same_encoder and stage < 3:
            size = 2 if self.bf16 and stage > 0 else 4
            sight = nn.ModuleDict(self.teacher.sight).parameters()
            whole -= sum(p.nbytes for p in sight if p.itemsize == size) if not self.shared else 0
        packed = _quantised(self.teacher) if placement in BITS else []
        return whole - sum(w.nbytes for w in packed) + _count(packed) * BITS.get(placement, 0) / 8

    def collator(self) -> Collator:
        data = self.config.data
        return Collator(*self.processors, data.max_length, turns(data), self.grouped, self.packed)

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        """What stands in a cache of features for images: as many numbers."""
        sizes = tuple(image.size for image in images)
        if sizes not in self._shapes:
            with torch.no_grad():
                (seen,) = self.student.see([self.student.processor.pictured(images)])
            self._shapes[sizes] = seen.shape
        return torch.zeros(self._shapes[sizes], dtype=DTYPES[self.config.training.dtype])

    def feature_bytes(self, images: Sequence[Image.Image]) -> int:
        """What a run reads of a sample's images from such a cache."""
        if not self.cached_sight:
            return 0
        return sum(self._features(group).nbytes for group in self.student.processor.seen_together(images))

    def run(self, meter: Meter, pairs: Sequence[Pair]) -> Micro:
        batch = self.collator().batch(list(pairs))
        teacher, cached = self.teacher if self.guides else None, 0
        ranks = 1 if self.sequence is None else self.sequence.size
        head = self._head(meter, -(-len(batch.targets) // ranks), -(-len(batch.teacher_targets) // ranks))
        if self.guides and self.likeliest is not None:
            cached = len(batch.teacher_targets) * (12 * self.likeliest + 4)
            teacher, batch = None, replace(batch, teacher=None)
        elif teacher is not None and self.cache is not None:
            weight = teacher.head.parameters[0]
            cached = len(batch.teacher_targets) * weight.shape[1] * weight.itemsize
            teacher, batch = None, replace(batch, teacher=None)
        try:
            with nullcontext() if self.sequence is None else self.sequence.shared():
                return simulate(
                    meter,
                    self.student,
                    teacher,
                    batch,
                    head,
                    autocast=self.autocast,
                    cached=cached,
                    vision_once=self.vision_once,
                )
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            # A class that decides by numbers, which are not there.
            raise UserError(f"plan: these models cannot run without weights: {first_line(error)}") from error

    def _head(self, meter: Meter, rows: int, teacher_rows: int) -> HeadCost:
        """What ``fused_linear`` holds and multiplies."""
        terms = [term for term in self.terms if isinstance(term, Term)]
        if not terms or not rows:
            return HeadCost(0, 0)
        guided = any("teacher" in term.loss.needs for term in terms)
        sides = [(self.student.head, rows)]
        if guided and self.likeliest is None:
            assert self.teacher is not None
            sides.append((self.teacher.head, teacher_rows))
        weights = []
        for head, _ in sides:
            with head.weight() as weight:
                weights.append(weight)
        flops = 2 * rows * weights[0].numel() * (2 + weights[0].requires_grad)
        flops += sum(2 * count * w.numel() for w, (_, count) in zip(weights[1:], sides[1:], strict=True))
        logits = sum(4 * count * len(w) for w, (_, count) in zip(weights, sides, strict=True))
        if not self.on_cpu:
            limit = TILE_BYTES if self.config.training.recompute_logits else CHUNK_BYTES
            return HeadCost(min(2 * logits, limit), flops)
        copies = sum(4 * w.numel() for w in weights if w.dtype != torch.float32)
        if self.config.training.recompute_logits:
            return HeadCost(copies + min(logits, TILE_BYTES_CPU), flops)
        return HeadCost(copies + min(logits + self._block(meter, terms, weights, rows), CHUNK_BYTES_CPU), flops)

    def _block(self, meter: Meter, terms: Sequence[Term], weights: Sequence[Tensor], most: int) -> int:
        """Bytes that the losses hold for a block of rows, its logits aside, found by letting them run on one."""
        if self.grouped:
            return 8 * BLOCK_BYTES_CPU
        rows = min(most, max(1, BLOCK_BYTES_CPU // (4 * len(weights[0]))))
        hidden = [w.new_empty(rows, w.shape[1]) for w in weights]
        hidden[0].requires_grad_()
        targets = torch.zeros(rows, dtype=torch.int64)
        teacher: HiddenTargets | TopKTargets | None = None
        if self.teacher is not None and len(hidden) > 1:
            teacher = HiddenTargets(hidden[1], self.teacher.head)
        elif self.likeliest is not None and self.guides:
            ids = torch.arange(self.likeliest).expand(rows, -1)
            teacher = TopKTargets(ids, hidden[0].new_empty(ids.shape), hidden[0].new_empty(rows))
        with meter.counting():
            fused_linear(terms, hidden[0], self.student.head, teacher, targets)
        made = sum(4 * rows * len(w) + (4 * w.numel() if w.dtype != torch.float32 else 0) for w in weights)
        gradients = 4 * hidden[0].numel() + (4 * weights[0].numel() if weights[0].requires_grad else 0)
        return max(0, meter.peak - made - gradients)


def _count(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _quantised(model: VisionLanguageModel) -> list[Tensor]:
    """Weights that are loaded in fewer bits: linear layers' but the output layer's; of an assembled model's decoder."""
    root = model.parts["decoder"] if isinstance(model, ComposedVLM) else model
    head = {id(p) for p in model.head.parameters}
    linear = {id(m.weight): m.weight for m in root.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
    return [weight for i, weight in linear.items() if i not in head]


def _sample(config: RunConfig, models: _Models) -> tuple[list[Pair], Sequences, float]:
    """Pairs as the run will meet them, what they look like, and steps of an epoch."""
    collator, data = models.collator(), config.data
    try:
        sources = open_sources(data.train, data.max_length)
    except UserError:
        if all(Path(section.path).exists() for section in data.train):
            raise
        if config.training.steps is None:
            raise UserError(
                "data.train: not there, so that nobody knows how many steps training.epochs are; set training.steps"
            ) from None
        return _assumed(models)
    weights = [section.weight for section in data.train]
    mixture = Mixture(sources, weights, seed=config.training.seed, batch_size=config.training.batch_size)
    first = Mixture(sources, weights, seed=config.training.seed, batch_size=SAMPLES)
    load, pairs, sizes, samples, reason = image_loader(data), list[Pair](), 0.0, 0, ""
    for source, row in first.rows(0):
        try:
            sample = sources[source][row]
            images = [] if isinstance(sample, Document) else [load(image) for image in sample.images]
            pairs += collator.encode(sample, images)
            sizes, samples = sizes + _size(sample, images), samples + 1
            sizes += models.feature_bytes(images)
        except BadSample as bad:
            reason = reason or str(bad)
    if not pairs:
        raise UserError(f"data.train: none of the first {SAMPLES} samples can be used; the first: {reason}")
    lengths = sorted(len(pair.student.input_ids) for pair in pairs)
    return (
        pairs,
        Sequences(
            sampled=samples,
            mean=sum(lengths) / samples,
            p95=lengths[math.ceil(0.95 * len(lengths)) - 1],
            longest=lengths[-1],
            supervised=sum(len(pair.student_tokens) for pair in pairs) / samples,
            images=sum(pair.student.images for pair in pairs) / samples,
            bytes=sizes / samples,
        ),
        mixture.steps_per_epoch,
    )


def _size(sample: Conversation | Document, images: Sequence[Image.Image]) -> float:
    """Bytes of a sample where it is stored, about: its text, and its images' files."""
    if isinstance(sample, Document):
        return len(sample.text.encode())
    text = sum(len(p["text"].encode()) for m in sample.messages for p in m["content"] if p["type"] == "text")
    stored = 0
    for source, image in zip(sample.images, images, strict=True):
        if isinstance(source, str | Path) and Path(source).is_file():
            stored += Path(source).stat().st_size
        elif isinstance(source, bytes):
            stored += len(source)
        else:
            stored += image.width * image.height * 3
    return text + stored


def _assumed(models: _Models) -> tuple[list[Pair], Sequences, float]:
    """A row of the greatest length with one image, the second half of its text supervised."""
    length = models.config.data.max_length

    def filled(processor: Processor) -> Encoded:
        row = processor.dummy()
        missing = length - len(row.input_ids)
        if missing < 2:
            raise UserError(f"data.max_length: {length} tokens have no room for text after {len(row.input_ids)} others")
        full = processor.answered(row, [models.student.pad_token] * missing)
        return replace(full, supervised=torch.arange(length) >= length - missing // 2)

    own, other = models.processors
    student, teacher = filled(own), None if other is None else filled(other)
    tokens = student.supervised.nonzero().flatten()
    others = tokens if teacher is None else teacher.supervised.nonzero().flatten()
    count = min(len(tokens), len(others))
    pair = Pair(student, teacher, tokens[-count:], others[-count:], torch.ones(count, dtype=torch.bool))
    return [pair], Sequences(0, length, length, length, count, student.images, 0.0), 1.0


def _memory(
    models: _Models,
    points: dict[int, Micro],
    micro: int,
    stage: int,
    placement: str,
    gpus: int,
    accumulation: int,
    limit: float,
) -> Memory:
    # Bytes a parameter as they were read off DeepSpeed 0.19.8's steps; docs/planning.md has the table.
    trained, many, fp32 = models.trained + models.learned, gpus > 1, not models.bf16 or stage == 0
    working = 4 if fp32 else 2
    whole = models.parameter_bytes(stage)
    parameters, live, fetched = whole, 0.0, 0.0
    if stage == 3 and many:
        parameters = whole / gpus + working * models.small
        live = min(LIVE * working, whole) - working * models.small
        fetched = min(PREFETCH * working, whole)
    # Adam's two states; ZeRO keeps float32 masters beside them, of float32 parameters, too.
    optimizer = (8 if stage == 0 else 12) * trained / (1 if stage == 0 else gpus)
    gradients = _gradients(models, stage, gpus, accumulation, fp32)
    # PyTorch updates a flat partition as one tensor, with temporaries of its size; on a GPU, all tensors at once.
    if stage == 0:
        step: float = 8 * models.largest if models.on_cpu else 4 * trained
    else:
        flat = 4 if fp32 or stage == 3 else 0  # others have theirs in one tensor already
        step = (flat + (8 if models.on_cpu else 4)) * models.group / gpus
    teacher, host = models.teacher_bytes(placement, stage), 0.0
    if placement == "shard":
        teacher = teacher / gpus + (min(LIVE * 2, teacher) if gpus > 1 else 0)
    elif placement == "offload":
        host, teacher = teacher / gpus, min(LIVE * 2, teacher)
    if stage >= 2 and models.deepspeed.offloads_optimizer:
        # Masters, states and sums of gradients are there, and the update.
        host += optimizer + 4 * trained / gpus
        optimizer, step, gradients = 0, 0, gradients.offloaded()
    if stage == 3 and models.deepspeed.offloads_parameters:
        host += whole / gpus
        parameters, live = 0.0, min(LIVE * working, whole)
    keeps = stage <= 1 and accumulation == 1
    # On a CPU all of it is one memory.
    static = parameters + optimizer + teacher + (host if models.on_cpu else 0)

    def forward(size: int) -> float:
        # Of small micro-batches the last gradients are the peak, of large ones the first activations.
        kinds = ["teacher", "student", *(["keeping"] if keeps else [])]
        return max(_line(points, size, kind) for kind in kinds)

    def peak(size: int) -> float:
        # Where gradients fit a bucket, it is full when the activations are gone.
        together = gradients.kept + (gradients.bucket if gradients.overflows else 0)
        running = live + together + max(fetched, forward(size))
        return static + max(running, gradients.kept + gradients.bucket, gradients.left + step)

    low, high = 0, 1
    while low < MOST and peak(high) <= limit:
        low, high = high, 2 * high
    while low < MOST and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= limit else (low, middle)
    return Memory(
        stage=stage,
        placement=placement,
        micro_batch=micro,
        parameters=round(parameters + live),
        optimizer=round(optimizer),
        gradients=round(gradients.kept),
        teacher=round(teacher),
        buckets=round(gradients.bucket),
        activations=round(forward(micro)),
        step=round(step),
        host=round(host),
        peak=round(peak(micro)),
        largest_micro_batch=low,
    )


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients on one rank.

    Attributes:
        kept: during a forward: sums of the micro-batches before, and what is there in any case.
        bucket: more while the ranks' gradients are put together, at the end of the backward.
        overflows: that happens during the backward, too: a bucket is smaller than all gradients.
        left: for the update.
        sums: of these, the float32 sums that go into main memory with the optimizer.
    """

    kept: float
    bucket: float
    overflows: bool
    left: float
    sums: float

    def offloaded(self) -> _Gradients:
        kept = max(0.0, self.kept - self.sums)
        return replace(self, kept=kept, left=max(0.0, self.left - self.sums), sums=0.0)


def _gradients(models: _Models, stage: int, gpus: int, accumulation: int, fp32: bool) -> _Gradients:
    trained, again = models.trained + models.learned, accumulation > 1
    working, whole, share = (4 if fp32 else 2), 4.0 * trained, 4.0 * trained / gpus
    # DeepSpeed allocates a bucket whole, and copies what it holds to send it.
    bucket, sent = working * min(models.bucket, models.total), working * min(models.bucket, trained)
    overflows = trained > models.bucket
    if stage == 0:
        sent = sent if gpus > 1 else 0
        return _Gradients(whole if again else 0, (0 if again else whole) + sent, False, whole, 0)
    if stage == 1 and not fp32:
        # A copy in float32 that stays, beside gradients in bf16; after the backward it is sent in float32, in copies.
        own = working * trained if again else 0
        return _Gradients(whole + own, max(0, 8 * min(BUCKET, trained) - own), False, whole + working * trained, 0)
    if stage == 1:
        return _Gradients(whole + bucket if again else 0, 0 if again else whole + bucket, overflows, share, 0)
    if stage == 2:
        # In float32 what comes is added to the sums when all of it is there.
        more = share if (again and gpus > 1 if fp32 else not again) else 0
        return _Gradients(share if again else 0, bucket + sent + more, overflows, share, share)
    # gloo copies once more.
    return _Gradients(share + bucket, (2 if models.on_cpu else 1) * sent, overflows, share + bucket, share)


def _line(points: dict[int, Micro], size: int, what: str) -> float:
    """A quantity at any micro-batch, from two that were simulated."""
    (a, first), (b, second) = ((at, getattr(points[at], what)) for at in sorted(points))
    return first + (second - first) * (size - a) / (b - a)
