"""What ``vlm-distill cache`` fills: the caches that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.processes import Processes

from . import fill_features as vision_cache
from . import fill_tokens as teacher_cache
from .store import filling


def check(config: RunConfig) -> None:
    """Raises ``UserError`` where the configuration names no cache."""
    if (config.teacher is None or config.teacher.cache is None) and config.student.vision_cache is None:
        raise UserError(
            "teacher.cache: says where the teacher's outputs go; set teacher.cache.folder, or student.vision_cache for "
            "the features of a frozen vision encoder"
        )


def fill(config: RunConfig, processes: Processes) -> None:
    """Fills them, the teacher's first: a teacher that is cached need not be loaded for the student's. Collective.

    Raises:
        UserError: none is named, another command is filling one of them, or it cannot be filled.
    """
    check(config)
    if config.teacher is not None and config.teacher.cache is not None:
        with _alone("teacher.cache", config.teacher.cache.folder, processes):
            teacher_cache.fill(config, processes)
    if config.student.vision_cache is not None:
        with _alone("student.vision_cache", config.student.vision_cache, processes):
            vision_cache.fill(config, processes)


@contextmanager
def _alone(key: str, folder: str, processes: Processes) -> Iterator[None]:
    """The first rank keeps other commands away for all; none looks into the folder before."""
    with filling(Path(folder), key) if processes.first else nullcontext():
        processes.barrier()
        yield
