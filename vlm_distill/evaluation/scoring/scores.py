"""What every scorer takes and gives: rows of a table in, `Scores` out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_distill.config.fields import Rules as Rules

Row = Mapping[str, Any]
Table = Sequence[Row]


@dataclass(frozen=True)
class Scores:
    """The result of one benchmark.

    Attributes:
        metric: name of the main metric, a key of ``overall`` or a sum of such, as ``docs/evaluation.md`` has it.
        main: its value as papers print it: per cent, but MME 0…2800 (perception and cognition together) and OCRBench
            0…1000. NaN where no row was scored.
        overall: metrics of the whole table, with the names and in the units of the reference.
        groups: the same for each group: category, split, task, answer type. NaN for a group without rows in a split.
        rows: a score in 0…1 for each row, in order; ``None`` for a row that the rules leave out.
        fallbacks: reason → number of rows in which the rules' last resort decided, for example ``"random"`` where the
            reference guesses and the answer counts as wrong here.
        judge: positions of the rows that only a judge can decide. Their score here is that of the deterministic part.
    """

    metric: str
    main: float
    overall: Mapping[str, float]
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rows: Sequence[float | None] = ()
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    judge: Sequence[int] = ()


#: Takes a table and the options of its benchmark. Raises ``UserError`` for a table that the rules cannot score.
Scorer = Callable[..., Scores]


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def missing(value: Any) -> bool:
    """Whether a cell is empty: ``None``, or the NaN that pandas puts there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def grouped(keys: Iterable[Hashable], values: Iterable[float]) -> dict[Any, list[float]]:
    """Values by key, in the order of first appearance; rows with an empty key are left out."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        if not missing(key):
            groups[key].append(value)
    return dict(groups)
