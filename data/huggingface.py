"""Parquet and arrow files and data sets of the Hugging Face hub as sources of conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .layouts import TEXT_COLUMNS
from .sources import ALL_ROWS, Source


class HuggingFaceSource(Source):
    """Records of a ``datasets.Dataset``. Images stay encoded until ``load_image`` checks and decodes them.

    Args:
        dataset: the data set; its own format and transforms are ignored.
    """

    def __init__(self, dataset: Any, name: str, images: Path, **shared: Any) -> None:
        super().__init__(name, images, **shared)
        if self.rows != ALL_ROWS:
            chosen = range(len(dataset))[self.rows]
            dataset = dataset.select(chosen if chosen else [])  # an empty range past the end is refused
        self._features = without_media(dataset.features)
        self._table = dataset.with_format("arrow")
        ours = {theirs: name for name, theirs in self.columns.items()}
        texts = [column for column in dataset.column_names if ours.get(column, column) in TEXT_COLUMNS]
        self._texts = self._table.select_columns(texts)

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> Any:
        return self._features.decode_example(self._table[index].to_pylist()[0])

    def size(self, index: int) -> int:
        return characters_in(self._texts[index].to_pylist()) if self._texts.column_names else 0

    def only_text(self) -> HuggingFaceSource:
        """Return a source with the column of texts alone. Raise ``UserError`` if there is none."""
        column = self.columns.get("text", "text")
        if column not in self._table.column_names:
            found = ", ".join(self._table.column_names)
            raise UserError(f"{self.name} has no column {column}, but {found}; name it with columns: {{text: …}}")
        texts = self._table.select_columns(column)
        if column != "text":
            texts = texts.rename_column(column, "text")
        alone = HuggingFaceSource(texts, self.name, self.images)
        alone.rows = self.rows  # which the table holds already
        return alone

    def sizes(self) -> NDArray[np.int64]:
        if self._table.column_names != ["text"]:
            return super().sizes()
        import pyarrow.compute  # finds lengths without reading the texts

        found = []
        for part in self._table.iter(batch_size=100_000):
            lengths = pyarrow.compute.fill_null(pyarrow.compute.binary_length(part["text"]), 0)
            found.append(lengths.to_numpy().astype(np.int64))
        return np.concatenate(found)


def without_media(feature: Any) -> Any:
    """Return features that leave images, sound and video encoded. JSON columns (datasets 5) are still parsed."""
    if isinstance(feature, dict):
        return type(feature)({key: without_media(value) for key, value in feature.items()})
    if isinstance(feature, list):
        return [without_media(value) for value in feature]
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=without_media(feature.feature))
    if hasattr(feature, "decode") and type(feature).__name__ != "Json":
        return dataclasses.replace(feature, decode=False)
    return feature


def characters_in(value: Any) -> int:
    """Count the characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    return sum(map(characters_in, value))
