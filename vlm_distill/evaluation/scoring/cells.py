"""Read a table's cells as the references do: predictions, right answers, lists written as text."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from data.errors import UserError

from .scores import Row, Rules, Table, missing


def column(table: Table, name: str) -> list[Any]:
    """Return a column that the rules need.

    Raises:
        UserError: a row does not have it.
    """
    for number, row in enumerate(table):
        if name not in row:
            raise UserError(f"row {number} has no column {name!r}, which these rules need")
    return [row[name] for row in table]


def literal(cell: Any) -> Any:
    """Return a cell's value if it is the literal of a list, tuple, dict or string, and the cell itself otherwise.

    VLMEvalKit passes such cells to ``eval``; real files hold nothing but literals.
    """
    # The parser would warn about plain text such as "3and".
    if not isinstance(cell, str) or cell.lstrip()[:1] not in tuple("[({'\""):
        return cell
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell


def as_text(value: Any, what: str) -> str:
    """Return the value, which must be text.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, not {value!r}")
    return value


def prediction(row: Row, rules: Rules) -> str:
    """Return the model's answer as text.

    An empty cell becomes what the reference makes of it: "nan" or "None" under VLMEvalKit, otherwise "". lmms-eval
    strips every answer before scoring.

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
    """Return the right answers: the list in ``answers``, or the cell ``answer``, which is one answer or a list.

    Records with a key ``answer``, as in the VQA files, count as text.

    Raises:
        UserError: there is no such column, or an answer is not text.
    """
    found = literal(row["answers"]) if "answers" in row else reference_cell(row)
    if not isinstance(found, list | tuple):
        found = [found]
    found = [answer["answer"] if isinstance(answer, Mapping) else answer for answer in found]
    return [as_text(answer, "a reference answer") for answer in found]


def reference_cell(row: Row) -> list[Any]:
    """Return the cell ``answer`` by VLMEvalKit's rule: a list's elements, or any other cell as the only text."""
    if "answer" not in row:
        raise UserError("a row has neither 'answers' nor 'answer'")
    cell = row["answer"]
    value = literal(cell)
    return list(value) if isinstance(value, list) else [cell_text(cell)]


def cell_text(cell: Any) -> str:
    """Return a cell as text; an empty one is "nan", as in pandas."""
    return "nan" if missing(cell) else str(cell)
