"""Read the questions of a source, and choose which of them a limit asks."""

from __future__ import annotations

from typing import Protocol

from data.batch import Problem
from data.conversation import Conversation
from data.errors import BadSample


class Countable(Protocol):
    def __len__(self) -> int: ...


class Questions(Protocol):
    """What evaluation needs of a data source (``data.sources.Source`` is one)."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Conversation: ...
    def size(self, index: int, /) -> int: ...


def evenly_spaced(n: int, limit: int | None) -> list[int]:
    """Return ``min(n, limit)`` indices spread evenly over ``range(n)``, always the same ones."""
    if limit is None or limit >= n:
        return list(range(n))
    return [i * n // limit for i in range(limit)]


def share(source: Countable, limit: int | None) -> list[int]:
    """Return the questions to ask under a limit, always the same ones.

    A source with a ``share`` method chooses them itself, so that questions scored together stay together.
    """
    if limit is not None and hasattr(source, "share"):
        return list(source.share(limit))
    return evenly_spaced(len(source), limit)


def read_question(source: Questions, index: int, references: bool = True) -> Conversation | Problem:
    """Return a question, or why it cannot be asked.

    Args:
        references: refuse a question without a right answer.
    """
    # Readers and benchmarks know the line even when the row cannot be read.
    line = source.line(index) if hasattr(source, "line") else index + 1
    try:
        conversation = source[index]
        line = conversation.line or line
        if references and not conversation.references:
            raise BadSample("no reference answer")
    except BadSample as bad:
        return Problem(source.name, line, bad.reason, bad.detail)
    return conversation
