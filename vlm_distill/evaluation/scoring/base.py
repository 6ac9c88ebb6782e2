"""What every scorer takes and gives: rows of a table in, ``Scores`` out.

A row holds one question: the columns of VLMEvalKit's TSV, or those of the official or lmms-eval files, and the model's
answer under ``prediction``. Cells may be Python values or their literals in text, as TSV files have them.
"""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.errors import UserError
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


def column(table: Table, name: str) -> list[Any]:
    """A column that the rules need.

    Raises:
        UserError: a row does not have it.
    """
    for number, row in enumerate(table):
        if name not in row:
            raise UserError(f"row {number} has no column {name!r}, which these rules need")
    return [row[name] for row in table]


def literal(cell: Any) -> Any:
    """A cell's Python value: what its list, tuple, dict or string stands for, or the cell itself where it is none.

    VLMEvalKit passes such cells to ``eval``; a literal is all that real files hold.
    """
    # Of plain text the parser would warn ("3and" is an odd number).
    if not isinstance(cell, str) or cell.lstrip()[:1] not in tuple("[({'\""):
        return cell
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell


def as_text(value: Any, what: str) -> str:
    """The value, which must be text.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, not {value!r}")
    return value


def prediction(row: Row, rules: Rules) -> str:
    """The model's answer as text.

    An empty cell is what the reference makes of it: "nan" or "None" under VLMEvalKit, else "". lmms-eval strips every
    answer before it scores.

    Raises:
        UserError: the row has no such column.
    """
    if "prediction" not in row:
        raise UserError("a row has no column 'prediction'")
    value = row["prediction"]
    if rules == "vlmevalkit":
        return str(value)
    text = "" if missing(value) else str(value)
    return text.strip() if rules == "lmms-eval" else text


def references(row: Row) -> list[str]:
    """The right answers: the list in ``answers``, or the cell ``answer``, which is one answer unless it holds a list.

    Records with a key ``answer``, as the VQA files have, are accepted for text.

    Raises:
        UserError: there is no such column, or an answer is not text.
    """
    found = literal(row["answers"]) if "answers" in row else reference_cell(row)
    if not isinstance(found, list | tuple):
        found = [found]
    found = [answer["answer"] if isinstance(answer, Mapping) else answer for answer in found]
    return [as_text(answer, "a reference answer") for answer in found]


def reference_cell(row: Row) -> list[Any]:
    """The cell ``answer`` by VLMEvalKit's rule: a list's elements, or anything else, as text, alone in a list."""
    if "answer" not in row:
        raise UserError("a row has neither 'answers' nor 'answer'")
    cell = row["answer"]
    value = literal(cell)
    return list(value) if isinstance(value, list) else [cell_text(cell)]


def cell_text(cell: Any) -> str:
    """Return a cell as text; of an empty one "nan", since that is what pandas has there."""
    return "nan" if missing(cell) else str(cell)


def grouped(keys: Iterable[Hashable], values: Iterable[float]) -> dict[Any, list[float]]:
    """Values by key, in the order of first appearance; rows with an empty key are left out."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        if not missing(key):
            groups[key].append(value)
    return dict(groups)
