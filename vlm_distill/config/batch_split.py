"""How a step's batch is split into ranks and micro-batches."""

from __future__ import annotations

from data.errors import UserError

from . import deepspeed_keys
from .sections import AnyRun


def split_batch(config: AnyRun, world: int) -> tuple[int, int]:
    """Return a rank's micro-batch and the micro-batches of a step; their product over ranks is the batch size.

    Ranks that share their samples count as one.

    Raises:
        UserError: the batch size is no multiple of them, or the ``deepspeed`` section says something else.
    """
    shared = getattr(config.training, "sequence_parallel", 1)
    if world % shared:
        raise UserError(
            f"training.sequence_parallel: {world} rank(s) are not a multiple of {shared}; change one of them"
        )
    world //= shared
    batch = config.training.batch_size
    micro = config.training.micro_batch_size or max(1, batch // world)
    if batch % (micro * world):
        per = micro * world
        near = sorted({max(per, batch // per * per), (batch // per + 1) * per})
        raise UserError(
            f"training.batch_size: {batch} is not divisible by micro_batch_size {micro} × {world} rank(s); "
            f"the nearest that are:  {', '.join(map(str, near))}"
        )
    accumulation = batch // (micro * world)
    source = f"training.batch_size and micro_batch_size on {world} rank(s)"
    values = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    try:
        deepspeed_keys.check_equal(
            config.deepspeed.extra, {key: deepspeed_keys.Set(value, source) for key, value in values.items()}
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return micro, accumulation


def halved(config: AnyRun, world: int) -> int | None:
    """The largest micro-batch up to half of the run's with which its batch still comes out even; ``None`` after 1."""
    micro, accumulation = split_batch(config, world)
    return next((m for m in range(micro // 2, 0, -1) if micro * accumulation % m == 0), None)
