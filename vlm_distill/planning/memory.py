"""What ZeRO holds on a rank beside a micro-batch's activations, by stage and placement of the teacher: arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from vlm_distill.config.sections import DeepSpeedSection

from .simulation import Micro

#: DeepSpeed's defaults: elements of a bucket, and of ZeRO-3 parameters that are whole at once, fetched at once, and of
#: those that stay whole the first too large.
BUCKET, LIVE, PREFETCH, PERSISTENT = 500_000_000, 1_000_000_000, 50_000_000, 100_000
#: The largest micro-batch that is looked for.
MOST = 4096


@dataclass(frozen=True)
class Sizes:
    """What of a run's models and settings decides what ZeRO holds.

    Attributes:
        total, trained: the student's parameters; ``learned``: the losses' own.
        largest: of the trained parameters, the one with the most numbers.
        group: parameters that are updated at once, the most of them.
        small: those that ZeRO-3 does not shard.
        bucket: gradients that a bucket holds.
        bf16: the run computes in it.
        on_cpu: the ranks are processes of one machine's memory.
        deepspeed: the run's section.
        weights: bytes of the student's working copy, whole, under a stage.
        teacher: bytes of the teacher's weights, whole, under a placement and a stage.
    """

    total: int
    trained: int
    learned: int
    largest: int
    group: int
    small: int
    bucket: int
    bf16: bool
    on_cpu: bool
    deepspeed: DeepSpeedSection
    weights: Callable[[int], float]
    teacher: Callable[[str, int], float]


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


def rank_memory(
    sizes: Sizes,
    points: Mapping[int, Micro],
    micro: int,
    stage: int,
    placement: str,
    gpus: int,
    accumulation: int,
    limit: float,
) -> Memory:
    """What a rank holds under one ZeRO stage and placement of the teacher.

    Args:
        sizes: of the sizes.
        points: two micro-batches that were simulated, by their samples.
        micro: samples of the run's own.
        stage: of ZeRO.
        placement: the teacher's: of ``teacher.placement``, ``cached``, ``served``, ``none``, or how it is quantised.
        gpus: ranks.
        accumulation: micro-batches of a step.
        limit: bytes of a rank, for the largest micro-batch.
    """
    # Bytes a parameter as they were read off DeepSpeed 0.19.8's steps; docs/planning.md has the table.
    trained, many, fp32 = sizes.trained + sizes.learned, gpus > 1, not sizes.bf16 or stage == 0
    working = 4 if fp32 else 2
    whole = sizes.weights(stage)
    parameters, live, fetched = whole, 0.0, 0.0
    if stage == 3 and many:
        parameters = whole / gpus + working * sizes.small
        live = min(LIVE * working, whole) - working * sizes.small
        fetched = min(PREFETCH * working, whole)
    # Adam's two states; ZeRO keeps float32 masters beside them, of float32 parameters, too.
    optimizer = (8 if stage == 0 else 12) * trained / (1 if stage == 0 else gpus)
    gradients = _gradients(sizes, stage, gpus, accumulation, fp32)
    # PyTorch updates a flat partition as one tensor, with temporaries of its size; on a GPU, all tensors at once.
    if stage == 0:
        step: float = 8 * sizes.largest if sizes.on_cpu else 4 * trained
    else:
        flat = 4 if fp32 or stage == 3 else 0  # others have theirs in one tensor already
        step = (flat + (8 if sizes.on_cpu else 4)) * sizes.group / gpus
    teacher, host = sizes.teacher(placement, stage), 0.0
    if placement == "shard":
        teacher = teacher / gpus + (min(LIVE * 2, teacher) if gpus > 1 else 0)
    elif placement == "offload":
        host, teacher = teacher / gpus, min(LIVE * 2, teacher)
    if stage >= 2 and sizes.deepspeed.offloads_optimizer:
        # Masters, states and sums of gradients are there, and the update.
        host += optimizer + 4 * trained / gpus
        optimizer, step, gradients = 0, 0, gradients.offloaded()
    if stage == 3 and sizes.deepspeed.offloads_parameters:
        host += whole / gpus
        parameters, live = 0.0, min(LIVE * working, whole)
    keeps = stage <= 1 and accumulation == 1
    # On a CPU all of it is one memory.
    static = parameters + optimizer + teacher + (host if sizes.on_cpu else 0)

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


def _gradients(sizes: Sizes, stage: int, gpus: int, accumulation: int, fp32: bool) -> _Gradients:
    trained, again = sizes.trained + sizes.learned, accumulation > 1
    working, whole, share = (4 if fp32 else 2), 4.0 * trained, 4.0 * trained / gpus
    # DeepSpeed allocates a bucket whole, and copies what it holds to send it.
    bucket, sent = working * min(sizes.bucket, sizes.total), working * min(sizes.bucket, trained)
    overflows = trained > sizes.bucket
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
    return _Gradients(share + bucket, (2 if sizes.on_cpu else 1) * sent, overflows, share + bucket, share)


def _line(points: Mapping[int, Micro], size: int, what: str) -> float:
    """A quantity at any micro-batch, from two that were simulated."""
    (a, first), (b, second) = ((at, getattr(points[at], what)) for at in sorted(points))
    return first + (second - first) * (size - a) / (b - a)
