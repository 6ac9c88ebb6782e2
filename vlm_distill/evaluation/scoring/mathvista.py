"""MathVista: extract a value from the answer, by a judge if the answer is more than the value, and compare it.

Source: Lu et al. 2024, "MathVista". A judge's extraction is in the column ``judge``, or as in the references in
``res`` (VLMEvalKit) or ``extraction`` (lmms-eval).
"""

from __future__ import annotations

import ast
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data.errors import UserError

from .cells import cell_text, literal, prediction
from .multiple_choice_vlmevalkit import letter
from .scores import Row, Rules, Scores, Table, mean, missing
from .text_match import levenshtein

#: lmms-eval's groups; all but ``question_type`` and ``answer_type`` are keys of the column ``metadata``.
_GROUPS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")


def found_value(row: Row, answer: Any) -> str | int | float | None:
    """Return the value in an answer by VLMEvalKit's rules, without a judge: a letter, an integer, a float, or ``None``.

    Numbers follow Python's syntax ("14.0" is not an integer, 14.7 becomes 14). Other free-form answers give the word
    "None", as in the reference, by mistake.

    Raises:
        UserError: the choices are not a list, or the answer to be read as a number is an empty cell.
    """
    if row["question_type"] == "multi_choice":
        choices = literal(row["choices"])
        if not isinstance(choices, list | tuple):
            raise UserError(f"the choices {row['choices']!r} of MathVista are not a list")
        return letter(answer, dict(zip(string.ascii_uppercase, choices, strict=False)))
    kind = {"integer": int, "float": float}.get(row["answer_type"])
    if kind is None:
        return "None"
    try:
        return kind(answer)
    except ValueError:
        return None
    except (TypeError, OverflowError):
        raise UserError(f"MathVista's answer {answer!r} is neither a number nor a text") from None


def right_value(row: Row) -> Any:
    """Return what VLMEvalKit compares ``found_value`` with; text if the right answer is not of its own type."""
    if row["question_type"] == "multi_choice":
        return row["answer_option"]
    kind = {"integer": int, "float": float}.get(row["answer_type"])
    try:
        return cell_text(row["answer"]) if kind is None else kind(row["answer"])
    except (ValueError, TypeError):
        return cell_text(row["answer"])


def prefetched(row: Row, answer: Any) -> str | int | float | None:
    """Return the value that needs no judge by VLMEvalKit's rules: any letter, or the right number; else ``None``."""
    found = found_value(row, answer)
    if row["question_type"] == "multi_choice" or found == right_value(row):
        return found
    return None


def extract(row: Row, answer: str) -> tuple[str, bool]:
    """Return lmms-eval's extraction without a judge, and whether a judge would be asked (the extraction is "" then).

    A choice's exact text, and a number where one is wanted, are their own extraction; for an empty answer it is "".
    """
    if not answer:
        return "", False
    if row["question_type"] == "multi_choice" and answer in _choices(row):
        return answer, False
    kind = {"integer": int, "float": float}.get(row["answer_type"])
    if kind is not None:
        try:
            return str(kind(answer)), False
        except ValueError:
            pass
    return "", True


def normalise(row: Row, extraction: Any) -> Any:
    """Return lmms-eval's extraction in the form of the right answer; ``None`` if it cannot have this form.

    Multiple choice: the text of the choice whose letter it is ("(b)" anywhere, or a capital), or else of the choice
    with the least edit distance, however large. Integers are truncated. Floats are rounded to ``precision`` decimals:
    to a whole number if it is missing, and to ``None`` if it is not an int, as in the data set (1.0).
    """
    if row["question_type"] == "multi_choice":
        choices = _choices(row)
        text = str(extraction).strip() if isinstance(extraction, str) else str(extraction)
        if bracketed := re.search(r"\(([a-zA-Z])\)", text):
            text = bracketed[1].upper()
        if len(text) == 1 and text in string.ascii_uppercase[: len(choices)]:
            return choices[string.ascii_uppercase.index(text)]
        return min(choices, key=lambda choice: levenshtein(text, choice))
    try:
        if row["answer_type"] == "integer":
            return str(int(float(extraction)))
        if row["answer_type"] == "float":
            return str(round(float(extraction), row["precision"]))
    except (TypeError, ValueError, OverflowError):
        return None
    return str(extraction) if row["answer_type"] == "list" else extraction


def is_right(row: Row, normalised: Any) -> bool:
    """Return whether two values are the same text, as in lmms-eval: "1.5" is not "1.50"."""
    return str(normalised).strip() == str(row["answer"]).strip()


def _choices(row: Row) -> Sequence[str]:
    found = literal(row["choices"])
    if not isinstance(found, list | tuple) or not found:
        raise UserError(f"the choices {row['choices']!r} of MathVista are not a list")
    return found


def score_mathvista(table: Table, *, rules: Rules = "vlmevalkit") -> Scores:
    """Return accuracy in per cent, grouped by task and skill (VLMEvalKit) or by all of ``metadata`` (lmms-eval).

    Raises:
        UserError: a cell is malformed; see the functions above.
    """
    return _kit(table) if rules == "vlmevalkit" else _lmms(table)


def _judged(row: Row, name: str) -> Any:
    """Return a judge's extraction, which may be an empty text, or ``None``."""
    return next((row[key] for key in (name, "judge") if not missing(row.get(key))), None)


def _kit(table: Table) -> Scores:
    totals, fetched, right = Counter[str](), Counter[str](), Counter[str]()
    scores: list[float | None] = []
    judge = []
    for position, row in enumerate(table):
        # A finished table of VLMEvalKit's has an extraction in every row, even if it is empty.
        extraction = _judged(row, "res") if "prediction" in row else row.get("res", "")
        by_itself = row.get("log") == "Prefetch succeed"
        if extraction is None:
            value = prefetched(row, prediction(row, "vlmevalkit"))
            # A right answer of 0 is falsy in the reference, which then asks its judge.
            by_itself = bool(value)
            # A failed extraction is empty in the reference's file, and "nan" when read back.
            extraction = value if by_itself else math.nan
            if not by_itself:
                judge.append(position)
        found = found_value(row, extraction)
        hit = found is not None and found == right_value(row)
        labels = ["Overall", *_skills(row), str(row["task"])]
        totals.update(labels)
        fetched.update(labels if by_itself else ())
        right.update(labels if hit else ())
        scores.append(float(hit))

    def metrics(label: str) -> dict[str, float]:
        counts = {"tot": float(totals[label]), "prefetch": float(fetched[label]), "hit": float(right[label])}
        rates = {name: 100 * counts[of] / counts["tot"] for name, of in (("prefetch_rate", "prefetch"), ("acc", "hit"))}
        return counts | rates

    groups = {label: metrics(label) for label in totals if label != "Overall"}
    overall = metrics("Overall") if table else {"acc": mean(())}
    return Scores("acc", overall["acc"], overall, groups, scores, judge=judge)


def _skills(row: Row) -> list[str]:
    """Return the skills of a row: a list's elements, or a text of several words.

    Raises:
        UserError: the cell is a single word or anything else, on which VLMEvalKit crashes.
    """
    cell = row["skills"]
    if isinstance(cell, str):
        try:
            ast.parse(cell, mode="eval")
        except SyntaxError:
            return [cell]
    found = literal(cell)
    if not isinstance(found, list | tuple):
        raise UserError(f"the skills {cell!r} of MathVista are not a list")
    return [str(skill) for skill in found]


def _lmms(table: Table) -> Scores:
    scores: list[float] = []
    judge, nearest = [], 0
    for position, row in enumerate(table):
        answer = str(row["response"] or "").strip() if "response" in row else prediction(row, "lmms-eval")
        extraction = _judged(row, "extraction")
        if extraction is None:
            extraction, asks = extract(row, answer)
            judge += [position] if asks else []
            nearest += row["question_type"] == "multi_choice" and not extraction
        scores.append(float(not missing(row.get("answer")) and is_right(row, normalise(row, extraction))))
    groups: dict[str, dict[str, float]] = {}
    for name in _GROUPS:
        cells = [row.get(name, (literal(row.get("metadata")) or {}).get(name)) for row in table]
        values = [literal(cell) if name == "skills" else cell for cell in cells]
        several = [value if isinstance(value, list | tuple) else [value] for value in values]
        for label in dict.fromkeys(label for found in several for label in found if not missing(label)):
            here = [score for score, found in zip(scores, several, strict=True) if label in found]
            groups[f"{name}: {label}"] = {"accuracy": round(100 * mean(here), 2)}
    overall = round(100 * mean(scores), 2) if scores else mean(())
    fallbacks = {"nearest choice to an empty extraction": nearest}
    return Scores("accuracy", overall, {"accuracy": overall}, groups, scores, fallbacks, judge)
