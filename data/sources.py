"""`Source`, the base class of every reader of conversations: samples by index, found again in any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conversation import Conversation
from .errors import BadSample
from .keys import is_empty
from .layouts import to_conversation
from .plugin_layouts import PluginLayout

ALL_ROWS = slice(None)


class Source(ABC):
    """Conversations by index, ``source[0]`` to ``source[len(source) - 1]``.

    A subclass says how many records there are (``__len__``), returns one as stored (``read``), and estimates its
    length (``size``). A source holds no open file, so worker processes can inherit or unpickle it.

    Args:
        name: the name in reports.
        images: the folder that relative image paths start from.
        answers_required: whether a record without an assistant's answer is a bad sample.
        columns: maps our name for a key (:data:`data.layouts.COLUMNS`) to the key that the records use.
        layout: reads the records, in place of ``columns``; ``None``: they have one of our layouts.
        rows: which of the records are read, without a step.

    Attributes:
        not_read: how often a key was met that nothing reads, such as ``rating`` or ``messages[].score``, counted while
            this process reads samples.
    """

    def __init__(
        self,
        name: str,
        images: Path,
        answers_required: bool = True,
        columns: Mapping[str, str] | None = None,
        layout: PluginLayout | None = None,
        rows: slice = ALL_ROWS,
    ) -> None:
        self.name = name
        self.images = images
        self.answers_required = answers_required
        self.columns = dict(columns or {})
        self.layout = layout
        self.rows = rows
        #: Names assigned by the user, which need no check for ambiguity.
        self.chosen = set(self.columns)
        self.not_read: Counter[str] = Counter()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Any:
        """Return the record as stored. Raise ``BadSample`` if it cannot be read."""

    def record(self, index: int) -> Any:
        """Return the record in one of our layouts. Raise ``BadSample`` if it cannot be read."""
        record = self.read(index)
        return self._renamed(record) if self.layout is None else self.layout.read(record)

    def _renamed(self, record: Any) -> Any:
        if not self.columns or not isinstance(record, Mapping):
            return record
        named = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        others = {key: value for key, value in record.items() if key not in self.columns.values()}
        self.not_read.update(key for key in named if not is_empty(others.get(key)))
        return others | named

    @abstractmethod
    def size(self, index: int) -> int:
        """Estimate the length of a sample in characters or bytes, for grouping by length. Cheap: decodes no image."""

    def sizes(self) -> NDArray[np.int64]:
        """Return :meth:`size` of every sample, ``[len(self)]``."""
        return np.array([self.size(i) for i in range(len(self))], dtype=np.int64)

    def line(self, index: int) -> int:
        """Return the 1-based position of a sample in its file, for reports."""
        return (self.rows.start or 0) + index + 1

    def __getitem__(self, index: int) -> Conversation:
        """Return the sample at ``index``. Raise ``BadSample`` if it is malformed, ``IndexError`` past the end."""
        index = range(len(self))[index]
        try:
            return to_conversation(
                self.record(index),
                images=self.images,
                source=self.name,
                line=self.line(index),
                answers_required=self.answers_required,
                unread=self.not_read,
                chosen=self.chosen,
            )
        except RecursionError:  # JSON allows any depth
            raise BadSample("nested too deeply", "a list or object in the record") from None


class IndexedFile(Source):
    """Records of a file, found by byte offset. A subclass calls :meth:`_index` once."""

    def _index(self, spans: Iterable[tuple[int, int, int]]) -> None:
        """Keep the line number, first byte and length of each record.

        In arrays, not lists: worker processes then share the memory, as nothing touches reference counts.
        """
        flat = array("q")
        for span in spans:
            flat.extend(span)
        self._lines, self._starts, self._lengths = np.array(flat, dtype=np.int64).reshape(-1, 3).T.copy()

    def __len__(self) -> int:
        return len(self._starts)

    def size(self, index: int) -> int:
        return int(self._lengths[index])

    def sizes(self) -> NDArray[np.int64]:
        return self._lengths

    def line(self, index: int) -> int:
        return int(self._lines[index])
