"""Fill the caches that a configuration names: ``vlm-distill cache``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from vlm_distill.config.checks import check_caches
from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.processes import Processes

from .fill_features import FeatureFilling
from .fill_loop import Filling, fill_records
from .fill_tokens import TokenFilling
from .store import filling


def fill(config: RunConfig, processes: Processes) -> None:
    """Fill all caches of a configuration, the teachers' first. Collective.

    Raises:
        UserError: none is named, another command is filling one of them, or it cannot be filled.
    """
    check_caches(config)
    for one in [config.only(name) for name in config.teachers] or [config]:
        if one.teacher is not None and one.teacher.cache is not None:
            fill_one(TokenFilling(one, processes))
    if config.student.vision_cache is not None:
        fill_one(FeatureFilling(config, processes))


def fill_one(job: Filling[Any]) -> None:
    """Fill one cache while no other command does. Collective."""
    with _exclusive(job):
        fill_records(job)


@contextmanager
def _exclusive(job: Filling[Any]) -> Iterator[None]:
    """Context manager: inside it, no other command fills the cache. The first rank holds the lock for all."""
    with filling(job.folder, job.key) if job.processes.first else nullcontext():
        job.processes.barrier()
        yield
