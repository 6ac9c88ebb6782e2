"""What a Python program hands over, as plain configuration: objects in memory get names that stand for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from data.errors import UserError
from data.in_memory import PREFIX, samples_in_memory
from vlm_distill.models import VisionLanguageModel, wrap_model
from vlm_distill.models.in_memory import HeldModel, left_as_it_was, models_in_memory

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Arguments(ExitStack):
    """Turns objects into names. Inside this context, the suite finds the objects by them, and leaves them unchanged."""

    def model(self, role: str, given: Any, *, trained: bool = False) -> dict[str, Any]:
        """Return the section of a model.

        Args:
            role: ``student``, ``teacher`` or another name for the model.
            given: a name or folder, a model from ``load_vlm``, ``(model, processor)`` of Transformers, or a section,
                whose ``path`` may be any of these.
            trained: whether it will be trained.

        Raises:
            UserError: it is nothing of these.
        """
        section = dict(given) if isinstance(given, Mapping) else {"path": given}
        if not isinstance(section.get("path", ""), str | os.PathLike):
            loaded = self._loaded(role, section["path"])
            section["path"] = f"{PREFIX}{role}"
            self.enter_context(models_in_memory({section["path"]: HeldModel(loaded, trained)}))
            if not trained:
                section.setdefault("dtype", self._dtype(role, loaded))
        return plain(section)

    def _loaded(self, role: str, given: Any) -> VisionLanguageModel:
        if isinstance(given, VisionLanguageModel):
            self.enter_context(left_as_it_was(given))
            return given
        if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], torch.nn.Module):
            self.enter_context(left_as_it_was(given[0]))
            try:
                return wrap_model(*given)
            except UserError as error:
                raise UserError(f"{role}: {error}") from None
        if isinstance(given, torch.nn.Module):
            raise UserError(f"{role}: a {type(given).__name__} without its processor; give (model, processor)")
        raise UserError(
            f"{role}: give a name, a folder, (model, processor) or a section of the configuration; found a "
            f"{type(given).__name__}"
        )

    @staticmethod
    def _dtype(role: str, model: VisionLanguageModel) -> str:
        if model.dtype not in _DTYPES:
            raise UserError(f"{role}: is in {model.dtype}; convert it to torch.bfloat16 or torch.float32")
        return _DTYPES[model.dtype]

    def sources(self, key: str, given: Any) -> list[dict[str, Any]]:
        """Return the sections of data sources.

        Args:
            key: the name of samples in memory; those of further sources are numbered.
            given: a path, a list of samples, a ``datasets.Dataset``, a source's section, whose ``path`` may be any of
                these, or a list of such sources.
        """
        sections: list[dict[str, Any]] = []
        for number, source in enumerate(_several(key, given), start=1):
            section = dict(source) if isinstance(source, Mapping) else {"path": source}
            if not isinstance(section["path"], str | os.PathLike):
                name = f"{PREFIX}{key}" if number == 1 else f"{PREFIX}{key}_{number}"
                self.enter_context(samples_in_memory({name: section["path"]}))
                section["path"] = name
            sections.append(plain(section))
        return sections


def _several(key: str, given: Any) -> list[Any]:
    """Return the sources that were given together."""
    if isinstance(given, str | os.PathLike) or is_dataset(key, given) or _is_source(given):
        return [given]
    if not isinstance(given, Sequence):
        raise UserError(
            f"{key}: give paths, lists of samples or data sets of the datasets library; found a {type(given).__name__}"
        )
    if given and all(isinstance(item, Mapping) and not _is_source(item) for item in given):
        return [given]
    found: list[Any] = []
    for item in given:
        found += _several(key, item)
    return found


def _is_source(given: Any) -> bool:
    """Return whether a mapping is a source's section; a sample of no layout has a path."""
    return isinstance(given, Mapping) and "path" in given


def is_dataset(key: str, given: Any) -> bool:
    """Return whether this is a ``datasets.Dataset``. Raise ``UserError`` for its relatives."""
    library = sys.modules.get("datasets")  # imported by whoever has made one
    if library is None:
        return False
    if isinstance(given, library.DatasetDict):
        raise UserError(f"{key}: these are several splits, {', '.join(given)}; give one of them, as dataset['train']")
    if isinstance(given, library.IterableDataset):
        raise UserError(f"{key}: an IterableDataset has no length and no order; give a Dataset, or a list of samples")
    return isinstance(given, library.Dataset)


def plain(value: Any) -> Any:
    """Return a configuration's value with paths as texts, and tuples as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
