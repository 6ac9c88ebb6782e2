"""What a run will cost: parameters, memory by ZeRO stage and teacher placement, operations, bytes read, time.

No weight is loaded. The models are built without values (``models``), and a micro-batch of the run's own data
(``samples``) goes through them, forward and backward (``simulation``); what ZeRO holds beside that follows from its
stage (``memory``). docs/planning.md says what is counted and compares it with measurements.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from data.errors import UserError
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.devices import DEVICES
from vlm_distill.training.evaluations import Evaluations

from .memory import Memory, rank_memory
from .models import Models, Part, PlannedRun
from .samples import Sequences, full_row, has_data, sample
from .simulation import Meter

STAGES = (0, 1, 2, 3)
#: The share of a GPU's peak operations that training is assumed to reach.
UTILISATION = 0.35
#: Memory outside tensors: bytes of CUDA's context and kernels and NCCL's buffers, and the share lost to fragmentation.
CONTEXT, FRAGMENTATION = 1.5e9, 0.05
#: Up to this micro-batch, the second simulated one has eight times its size; above, it has one sample.
_FAR = 16


@dataclass(frozen=True)
class Plan:
    """The cost of a run.

    Attributes:
        sequences: what samples look like in tokens; ``None`` for a classifier, which reads none.
        memory: of a rank, for every ZeRO stage and placement of the teacher that is worth comparing.
        configured: index in ``memory`` of the configured one.
        budget: bytes of a GPU.
        allowance: bytes of the budget that are kept free for what is not tensors.
        flops: of an optimizer step, all ranks together.
        seconds: of the training, without evaluation and waiting for data; ``None`` on a CPU, and for a classifier.
        remarks: what the plan assumes and leaves out.
    """

    parts: tuple[Part, ...]
    sequences: Sequences | None
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
    remarks: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.gpus / 3600

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None else self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for ``plan.json``."""
        found = asdict(self)
        found["told"] = found.pop("remarks")  # the file's key
        return found | {"gpu_hours": self.gpu_hours, "tokens_per_second": self.tokens_per_second}


def plan(config: RunConfig, *, gpus: int = 1, memory: float | None = None, device: str = "h100") -> Plan:
    """Compute what a run will cost.

    Args:
        config: of the run.
        gpus: number of ranks.
        memory: of a GPU, in GB; default: the device's.
        device: a name in ``devices.DEVICES``, or ``cpu``.

    Raises:
        UserError: the device is unknown, a model's configuration cannot be read, or the run itself would be refused.
    """
    budget = budget_of(device, memory)
    allowance = 0.0 if device == "cpu" else CONTEXT + FRAGMENTATION * budget
    micro, accumulation = split_batch(config, gpus)

    # Check what needs no model.
    run = PlannedRun(config)
    _ = run.terms
    available = _open_data(run, gpus)

    # Build the models without weights, and simulate micro-batches of two sizes and one of typical samples.
    with Meter() as meter:
        models = Models(run, device)
        pairs, sequences = sample(run) if available else full_row(run)
        longest = max(pairs, key=lambda pair: len(pair.student.input_ids))
        sizes = (micro, 8 * micro if micro <= _FAR else 1)
        points = {size: models.measure(meter, [longest] * size) for size in sizes}
        typical = points[micro] if sequences.sampled == 0 else models.measure(meter, (pairs * micro)[:micro])

    # Add what ZeRO holds, by stage and placement of the teacher.
    configured, placements = models.placements()
    # ZeRO-3 cannot shard a quantized student.
    stages = STAGES if config.student.quantize is None else STAGES[:-1]
    choices = [(stage, placement) for placement in placements for stage in stages]
    rows = [
        rank_memory(models.sizes, points, micro, *choice, gpus, accumulation, budget - allowance) for choice in choices
    ]

    steps = config.training.steps or math.ceil((config.training.epochs or 0) * run.epoch_steps)
    samples = steps * config.training.batch_size
    flops = float(typical.student_flops + typical.teacher_flops) * accumulation * gpus
    return Plan(
        parts=models.parts(),
        sequences=sequences,
        memory=tuple(rows),
        configured=choices.index((config.deepspeed.stage, configured)),
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
        seconds=_seconds(config, steps * flops, gpus, device),
        remarks=models.remarks,
    )


def _open_data(run: PlannedRun, gpus: int) -> bool:
    """Return whether the training data is there. If it is, what the run is evaluated on must be there too."""
    available = has_data(run)
    if available:
        ranks: Any = SimpleNamespace(world=gpus)
        Evaluations(run.config, ranks)
    return available


def budget_of(device: str, memory: float | None) -> float:
    """Return the bytes of memory of a rank. Raise ``UserError`` for an unknown device, or a CPU's unknown memory."""
    if device not in {*DEVICES, "cpu"}:
        raise UserError(f"--device: {device} is not known; choose cpu or one of {', '.join(DEVICES)}")
    if memory is not None:
        return 1e9 * memory
    if device == "cpu":
        raise UserError("--memory: say how many GB a rank has on a cpu")
    return 1e9 * DEVICES[device].memory


def _seconds(config: RunConfig, flops: float, gpus: int, device: str) -> float | None:
    """Return the seconds that a training takes; ``None`` on a CPU, whose peak is unknown."""
    if device == "cpu":
        return None
    peak = DEVICES[device].bf16 if config.training.dtype == "bf16" else DEVICES[device].fp32
    return flops / (gpus * peak * UTILISATION)
