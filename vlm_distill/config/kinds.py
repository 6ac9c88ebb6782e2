"""Configurations of either path: a vision-language or language model's, or an image classifier's."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from vlm_distill.neighbours import check_neighbours

from .differences import completed
from .file import merged_config, read_saved
from .sections import RunConfig


def kind_of(path: Path) -> type[Any]:
    """Return the model of a run's configuration: a classifier's if it has ``student.name``, which no other has."""
    return _kind_of(merged_config(path))


def _kind_of(settings: Mapping[str, Any]) -> type[Any]:
    student = settings.get("student")
    if isinstance(student, Mapping) and "name" in student:
        return classifier_kind()
    return RunConfig


def read_run(path: Path) -> Any:
    """Return a run's ``config.yaml`` as plain values, as this version would have written it.

    Raises:
        UserError: the file is damaged.
    """
    settings = read_saved(path)
    return completed(settings, _kind_of(settings)) if isinstance(settings, Mapping) else settings


def classifier_kind() -> type[Any]:
    """Return the model of a classifier's configuration."""
    # Imported by name: nothing in vlm_distill depends on vision.
    check_neighbours("vision")
    kind: type[Any] = import_module("vision.config").ClassifierConfig
    return kind
