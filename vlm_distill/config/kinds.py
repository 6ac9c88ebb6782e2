"""Which of the two paths a run's file is of: a vision-language or language model's, or an image classifier's."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from vlm_distill.neighbours import check_neighbours

from .file import merged_config
from .sections import RunConfig


def kind_of(path: Path) -> type[Any]:
    """Return the model of a run's configuration: a classifier's if it has ``student.name``, which no other has."""
    student = merged_config(path).get("student")
    if isinstance(student, Mapping) and "name" in student:
        return classifier_kind()
    return RunConfig


def classifier_kind() -> type[Any]:
    """Return the model of a classifier's configuration."""
    # Imported by name: nothing in vlm_distill depends on vision.
    check_neighbours("vision")
    kind: type[Any] = import_module("vision.config").ClassifierConfig
    return kind
