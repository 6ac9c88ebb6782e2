"""A run's cost before it is paid: parameters, memory by ZeRO stage and placement, operations, bytes read, time.

No weight is loaded. The models are built without numbers (``models``), and a micro-batch of the run's own data
(``samples``) goes through them, forward and backward (``simulation``); what ZeRO holds beside that follows from its
stage (``memory``). docs/planning.md says what is counted, and how far it was from what was measured.
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
from .models import Models, Part
from .samples import Sequences, open_training, sample
from .simulation import Meter

STAGES = (0, 1, 2, 3)
#: Share of a GPU's peak that a training is taken to reach.
UTILISATION = 0.35
#: Not of tensors: CUDA's context and kernels and NCCL's buffers, in bytes, and the share lost between blocks.
CONTEXT, FRAGMENTATION = 1.5e9, 0.05
#: Micro-batches up to this are planned beside one of eight times their size.
_FAR = 16


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
        UserError: an unknown device, a model whose configuration cannot be read, or what the run would refuse.
    """
    if device not in {*DEVICES, "cpu"}:
        raise UserError(f"--device: {device} is not known; choose cpu or one of {', '.join(DEVICES)}")
    if device == "cpu" and memory is None:
        raise UserError("--memory: say how many GB a rank has on a cpu")
    budget = 1e9 * (memory or DEVICES[device].memory)
    allowance = 0.0 if device == "cpu" else CONTEXT + FRAGMENTATION * budget
    micro, accumulation = split_batch(config, gpus)
    sources = open_training(config)
    if sources is not None:
        # Where the data are, what the run is evaluated on is to be there too: it refuses what the run would.
        ranks: Any = SimpleNamespace(world=gpus)
        Evaluations(config, ranks)
    with Meter() as meter:
        models = Models(config, device)
        pairs, sequences, epoch_steps = sample(config, sources, models)
        longest = max(pairs, key=lambda pair: len(pair.student.input_ids))
        sizes = (micro, 8 * micro if micro <= _FAR else 1)
        points = {size: models.run(meter, [longest] * size) for size in sizes}
        typical = points[micro] if sequences.sampled == 0 else models.run(meter, (pairs * micro)[:micro])
    own, placements = models.placements()
    limit = budget - allowance
    rows: list[Memory] = []
    configured = 0
    for placement in placements:
        for stage in STAGES:
            if stage == 3 and config.student.quantize is not None:
                continue  # which no run does
            if stage == config.deepspeed.stage and placement == own:
                configured = len(rows)
            rows.append(rank_memory(models.sizes, points, micro, stage, placement, gpus, accumulation, limit))
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
