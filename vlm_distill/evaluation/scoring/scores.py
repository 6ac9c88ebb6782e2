"""What scorers take and return: a table in, :class:`Scores` out.

A row holds one question: the columns of VLMEvalKit's TSV, or of the official or lmms-eval files, and the model's answer
under ``prediction``. Cells may be Python values or, as in TSV files, their literals in text.
"""

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
        metric: name of the main metric: a key of ``overall``, or a sum of several (``docs/evaluation.md``).
        main: its value as papers print it: per cent, except MME 0…2800 (perception and cognition together) and
            OCRBench 0…1000. NaN if no row was scored.
        overall: metrics of the whole table, with the reference's names and units.
        groups: the same for each group: category, split, task, answer type. NaN for a group without rows in a split.
        rows: a score in 0…1 for each row, in order; ``None`` for a row that the rules leave out.
        fallbacks: reason → number of rows decided by the rules' last resort, for example ``"random"`` where the
            reference guesses; here such an answer is wrong.
        judge: positions of the rows that only a judge can decide. Their score is that of the deterministic part.
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
    """Return the arithmetic mean; NaN without values."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def missing(value: Any) -> bool:
    """Return whether a cell is empty: ``None``, or the NaN that pandas puts there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def grouped(keys: Iterable[Hashable], values: Iterable[float]) -> dict[Any, list[float]]:
    """Return values by key, in the order of first appearance, without rows whose key is empty."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        if not missing(key):
            groups[key].append(value)
    return dict(groups)
