"""What ZeRO holds on a rank beside a micro-batch's activations, by ZeRO stage and placement of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vlm_distill.config.sections import DeepSpeedSection

from .simulation import Micro

#: DeepSpeed's defaults, in elements: of a bucket, of ZeRO-3 parameters that are gathered at once, of those that are
#: fetched ahead, and of the smallest parameter that ZeRO-3 shards.
BUCKET, LIVE, PREFETCH, PERSISTENT = 500_000_000, 1_000_000_000, 50_000_000, 100_000
#: The largest micro-batch that is searched for.
MOST = 4096


def zero3_elements(section: DeepSpeedSection, key: str, default: int) -> int:
    """Return one of ZeRO-3's limits, in elements; DeepSpeed reads the key with and without ``stage3_`` before it."""
    value = section.zero.get(f"stage3_{key}", section.zero.get(key))
    return int(value) if isinstance(value, int | float) else default


@dataclass(frozen=True)
class Sizes:
    """What decides how much ZeRO holds: sizes of a run's models, and its settings.

    Attributes:
        total, trained: numbers of the student's parameters.
        learned: number of the losses' own parameters.
        largest: elements of the largest trained parameter.
        group: elements of the largest optimizer group.
        small: elements of the parameters that ZeRO-3 does not shard.
        bucket: gradients that a bucket holds.
        bf16: whether the run computes in bf16.
        on_cpu: whether the ranks share one machine's main memory.
        deepspeed: the run's section.
        weights: bytes of the student's working copy, unsharded, by ZeRO stage.
        teacher: bytes of the teacher's weights, unsharded, by placement and ZeRO stage.
        states: bytes of the optimizer's states per trained parameter.
        several: with several teachers, the placement of each and the bytes of its weights, unsharded.
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
    states: float = 8.0
    several: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank under one ZeRO stage and placement of the teacher, for one micro-batch.

    Attributes:
        parameters, optimizer, gradients: the student's during a forward; float32 masters count as ``optimizer``.
        teacher: its weights.
        buckets: more memory of gradients at the end of a backward, in DeepSpeed's buckets and beside them.
        activations: alive at the peak of forward and backward, with the losses' buffers and the micro-batch.
        step: temporaries of the update.
        host: in main memory, if something is offloaded.
        peak: the most at once, in a forward and backward, at its end, or in the update: less than the sum of the above.
        largest_micro_batch: the largest one that fits beside the allowance; 0: none fits.
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
    """Compute what a rank holds under one ZeRO stage and placement of the teacher.

    The bytes per parameter were read off DeepSpeed 0.19.8's steps; docs/planning.md has the table.

    Args:
        sizes: of models, losses and settings.
        points: two simulated micro-batches, by their number of samples.
        micro: samples of the run's own micro-batch.
        stage: ZeRO stage.
        placement: of the teacher, as configured, or ``cached``, ``served``, ``none``, ``several`` or its quantization.
        gpus: number of ranks.
        accumulation: micro-batches of a step.
        limit: bytes of a rank, for the largest micro-batch.
    """
    trained, fp32 = sizes.trained + sizes.learned, not sizes.bf16 or stage == 0
    parameters = _parameters(sizes, stage, gpus, fp32)
    gradients = _gradients(sizes, stage, gpus, accumulation, fp32)
    # ZeRO keeps float32 masters beside the optimizer's states, even of float32 parameters.
    optimizer = sizes.states * trained if stage == 0 else (sizes.states + 4) * trained / gpus
    step = _update(sizes, stage, gpus, fp32)
    teacher, host = _teacher(sizes, stage, placement, gpus)

    # Move what is offloaded into main memory.
    if stage >= 2 and sizes.deepspeed.offloads_optimizer:
        # Masters, states and sums of gradients, and the update is computed there.
        host += optimizer + 4 * trained / gpus
        optimizer, step, gradients = 0, 0, gradients.offloaded()
    if stage == 3 and sizes.deepspeed.offloads_parameters:
        host += parameters.whole / gpus
        parameters = parameters.offloaded()

    # On a CPU both are one memory.
    static = parameters.kept + optimizer + teacher + (host if sizes.on_cpu else 0)
    kinds = ["teacher", "student", *(["keeping"] if stage <= 1 and accumulation == 1 else [])]
    moments = _Moments(static, parameters, gradients, step, points, kinds)
    return Memory(
        stage=stage,
        placement=placement,
        micro_batch=micro,
        parameters=round(parameters.kept + parameters.live),
        optimizer=round(optimizer),
        gradients=round(gradients.kept),
        teacher=round(teacher),
        buckets=round(gradients.bucket),
        activations=round(moments.activations(micro)),
        step=round(step),
        host=round(host),
        peak=round(moments.peak(micro)),
        largest_micro_batch=_largest(moments.peak, limit),
    )


@dataclass(frozen=True)
class _Moments:
    """What is alive together at the moments of a step that may be its peak.

    Attributes:
        static: bytes alive all the time.
        parameters, gradients: bytes that come and go.
        step: temporaries of the update.
        points: two simulated micro-batches, by their number of samples.
        kinds: fields of ``Micro`` that may be the peak of a forward and backward.
    """

    static: float
    parameters: _Parameters
    gradients: _Gradients
    step: float
    points: Mapping[int, Micro]
    kinds: Sequence[str]

    def activations(self, size: int) -> float:
        """Return the bytes of activations at their peak, for a micro-batch of this size."""
        # The peak is at the last gradients in small micro-batches, at the first activations in large ones.
        return max(_line(self.points, size, kind) for kind in self.kinds)

    def peak(self, size: int) -> float:
        """Return the most bytes alive at once: in the backward, at its end, or in the update."""
        parameters, gradients = self.parameters, self.gradients
        # A bucket that holds all gradients is full when the activations are gone.
        together = gradients.kept + (gradients.bucket if gradients.overflows else 0)
        running = parameters.live + together + max(parameters.fetched, self.activations(size))
        return self.static + max(running, gradients.kept + gradients.bucket, gradients.left + self.step)


def _largest(peak: Callable[[int], float], limit: float) -> int:
    """Return the largest micro-batch whose peak is within the limit, at most ``MOST``; 0: none is."""
    low, high = 0, 1
    while low < MOST and peak(high) <= limit:
        low, high = high, 2 * high
    while low < MOST and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= limit else (low, middle)
    return low


@dataclass(frozen=True)
class _Parameters:
    """Bytes of the student's working copy on one rank.

    Attributes:
        whole: of all ranks together.
        kept: between the uses of a layer.
        live: more, of parameters that ZeRO-3 has gathered for use.
        fetched: more, of parameters that ZeRO-3 gathers ahead.
        most_live: the most that ZeRO-3 gathers at once.
    """

    whole: float
    kept: float
    live: float = 0.0
    fetched: float = 0.0
    most_live: float = 0.0

    def offloaded(self) -> _Parameters:
        return replace(self, kept=0.0, live=self.most_live)


def _parameters(sizes: Sizes, stage: int, gpus: int, fp32: bool) -> _Parameters:
    working, whole = 4 if fp32 else 2, sizes.weights(stage)
    most_live = min(zero3_elements(sizes.deepspeed, "max_live_parameters", LIVE) * working, whole)
    if stage < 3 or gpus == 1:
        return _Parameters(whole, whole, most_live=most_live)
    small = working * sizes.small
    ahead = zero3_elements(sizes.deepspeed, "prefetch_bucket_size", PREFETCH) * working
    # Small parameters are whole all the time, even if fewer may be live.
    return _Parameters(whole, whole / gpus + small, max(0, most_live - small), min(ahead, whole), most_live)


def _update(sizes: Sizes, stage: int, gpus: int, fp32: bool) -> float:
    """Return the bytes that the update holds for a moment.

    PyTorch updates a flat partition as one tensor, with temporaries of its size; on a GPU, all tensors at once.
    """
    if stage == 0:
        return 8 * sizes.largest if sizes.on_cpu else 4 * (sizes.trained + sizes.learned)
    flat = 4 if fp32 or stage == 3 else 0  # otherwise the gradients are one tensor already
    return (flat + (8 if sizes.on_cpu else 4)) * sizes.group / gpus


def _teacher(sizes: Sizes, stage: int, placement: str, gpus: int) -> tuple[float, float]:
    """Return the bytes of the teacher's weights, or of several teachers', on the device and in main memory."""
    each = [_placed(whole, place, gpus) for place, whole in sizes.several]
    each = each or [_placed(sizes.teacher(placement, stage), placement, gpus)]
    return sum(device for device, _ in each), sum(host for _, host in each)


def _placed(whole: float, placement: str, gpus: int) -> tuple[float, float]:
    """Return the bytes of one teacher's weights on the device and in main memory."""
    if placement == "shard":
        return whole / gpus + (min(LIVE * 2, whole) if gpus > 1 else 0), 0.0
    if placement == "offload":
        return min(LIVE * 2, whole), whole / gpus
    return whole, 0.0


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients on one rank.

    Attributes:
        kept: during a forward: sums over earlier micro-batches, and buffers that are never freed.
        bucket: more while the ranks' gradients are reduced, at the end of the backward.
        overflows: whether a bucket is smaller than all gradients, so that they are also reduced during the backward.
        left: bytes of gradients when the update starts.
        sums: the float32 sums among ``kept`` and ``left``, which move to main memory with the optimizer.
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
    """Return what DeepSpeed keeps of gradients under one ZeRO stage."""
    trained, again = sizes.trained + sizes.learned, accumulation > 1
    working, whole, share = (4 if fp32 else 2), 4.0 * trained, 4.0 * trained / gpus
    # DeepSpeed allocates whole buckets, and copies their content to send it.
    bucket, sent = working * min(sizes.bucket, sizes.total), working * min(sizes.bucket, trained)
    overflows = trained > sizes.bucket
    if stage == 0:
        sent = sent if gpus > 1 else 0
        return _Gradients(whole if again else 0, (0 if again else whole) + sent, False, whole, 0)
    if stage == 1 and not fp32:
        # A float32 copy is kept beside gradients in bf16; after the backward it is sent in float32, in copies.
        own = working * trained if again else 0
        return _Gradients(whole + own, max(0, 8 * min(BUCKET, trained) - own), False, whole + working * trained, 0)
    if stage == 1:
        return _Gradients(whole + bucket if again else 0, 0 if again else whole + bucket, overflows, share, 0)
    if stage == 2:
        # In float32, new gradients are added to the sums once all of them are there.
        more = share if (again and gpus > 1 if fp32 else not again) else 0
        return _Gradients(share if again else 0, bucket + sent + more, overflows, share, share)
    # gloo makes one more copy.
    return _Gradients(share + bucket, (2 if sizes.on_cpu else 1) * sent, overflows, share + bucket, share)


def _line(points: Mapping[int, Micro], size: int, what: str) -> float:
    """Return a quantity for any micro-batch by a line through the two simulated ones."""
    (a, first), (b, second) = ((at, getattr(points[at], what)) for at in sorted(points))
    return first + (second - first) * (size - a) / (b - a)
