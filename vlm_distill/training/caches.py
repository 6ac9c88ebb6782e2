"""What ``vlm-distill cache`` fills: the caches that a configuration names."""

from __future__ import annotations

from data.errors import UserError
from vlm_distill.config import RunConfig

from . import teacher_cache, vision_cache
from .engine import Processes


def check(config: RunConfig) -> None:
    """Raises ``UserError`` where the configuration names no cache."""
    if not (_of_teacher(config) or config.student.vision_cache is not None):
        raise UserError(
            "teacher.cache: says where the teacher's outputs go; set teacher.cache.folder, or student.vision_cache for "
            "the features of a frozen vision encoder"
        )


def fill(config: RunConfig, processes: Processes) -> None:
    """Fills them, the teacher's first: a teacher that is cached need not be loaded for the student's. Collective."""
    check(config)
    if _of_teacher(config):
        teacher_cache.fill(config, processes)
    if config.student.vision_cache is not None:
        vision_cache.fill(config, processes)


def _of_teacher(config: RunConfig) -> bool:
    return config.teacher is not None and config.teacher.cache is not None
