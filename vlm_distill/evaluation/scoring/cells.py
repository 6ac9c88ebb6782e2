"""Cells of a table as the references read them: predictions, right answers, lists written as text."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from data.errors import UserError

from .scores import Row, Rules, Table, missing


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
