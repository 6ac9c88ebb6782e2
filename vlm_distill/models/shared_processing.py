"""Encode each sample once for a student and a teacher whose processors do the same."""

from __future__ import annotations

from typing import Any

from .processor import Processor


def share_processing(student: Processor, teacher: Any) -> tuple[Processor, Any]:
    """Return what encodes samples for both models: the student's processor twice if the teacher's does the same.

    Collation recognises one processor that serves both models, encodes each sample once, and makes one set of tensors.
    A teacher that is cached has no processor of its own, and is left as it is.
    """
    if isinstance(teacher, Processor) and student.recipe() == teacher.recipe():
        return student, student
    return student, teacher
