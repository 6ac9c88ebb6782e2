"""Deal batches to ranks, and gather their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

#: Takes this rank's list of objects; returns every rank's list, in rank order.
AllGather = Callable[[list[Any]], list[list[Any]]]


@dataclass(frozen=True)
class RankShare:
    """This process's share of the work.

    Attributes:
        rank, world: its number, and how many ranks there are.
        all_gather: gives every rank's list to every rank; needed when ``world`` > 1.
    """

    rank: int = 0
    world: int = 1
    all_gather: AllGather | None = None

    def __post_init__(self) -> None:
        if self.world > 1 and self.all_gather is None:
            raise ValueError("several ranks need all_gather")

    @property
    def first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def deal(self, batches: Sequence[Sequence[T]]) -> list[Sequence[T]]:
        """Return this rank's batches: every ``world``-th, padded with empty ones so that all ranks have equally many.

        Under ZeRO-3, ranks wait for each other in every forward, so each must run the same number of batches.
        With 5 batches on 2 ranks, rank 0 gets batches 0, 2 and 4; rank 1 gets 1, 3 and an empty one.
        """
        rounds = math.ceil(len(batches) / self.world)
        mine = range(self.rank, rounds * self.world, self.world)
        return [batches[number] if number < len(batches) else [] for number in mine]

    def gather(self, found: T) -> list[T]:
        """Return every rank's value, in rank order."""
        if self.all_gather is None:
            return [found]
        return [value for values in self.all_gather([found]) for value in values]
