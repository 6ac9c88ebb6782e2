"""Multiple choice as VLMEvalKit scores it: MMBench, MMStar, AI2D, SEEDBench, ScienceQA, RealWorldQA, MMMU.

If the answer names no option, VLMEvalKit asks a judge and, if that fails too, guesses. Here a judge's reply may be in
the column ``judge``; without it the answer is wrong, and ``Scores.judge`` lists the row.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import UserError

from .cells import column, prediction
from .scores import Row, Scores, Table, mean, missing

#: Texts that VLMEvalKit takes as a refusal, which is the option "Z": wrong, without asking a judge.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILURE = "Failed to obtain answer via API"
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Only A to D are looked for, and the letter may begin a word: "answer is Denmark" names D.
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)

#: MMBench's abilities as VLMEvalKit's tables name them.
_ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def letter(answer: Any, choices: Mapping[str, Any], *, verbose: bool = False) -> str | None:
    """Return the option that an answer names, "Z" for a refusal, or ``None``.

    In this order: the one option letter that stands alone in the answer, if it is among the last four words; the
    letter after "answer is"; the one option whose text is in the answer, unless the answer is more than twice as long
    as all options together.

    Args:
        answer: converted to text.
        choices: letter → text of the option.
        verbose: whether VLMEvalKit runs with a non-empty ``VERBOSE``; then an answer of more than three words with a
            single "A" has no letter.
    """
    answer = str(answer)
    return _letter_by_name(answer, choices, verbose) or _letter_by_text(answer, choices)


def _letter_by_name(answer: str, choices: Mapping[str, Any], verbose: bool) -> str | None:
    if _API_FAILURE in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_TO_SPACES).split()
    named = [choice for choice in choices if choice in words]
    if len(named) == 1:
        if verbose and "A" in words and len(words) > 3:
            return None
        if words.index(named[0]) > len(words) - 5:
            return named[0]
    elif not named and "Z" in words:
        return "Z"
    found = _ANSWER_IS.search(answer)
    return found[1].upper() if found and found[1].upper() in choices else None


def _letter_by_text(answer: str, choices: Mapping[str, Any]) -> str | None:
    texts = {choice: str(text) for choice, text in choices.items()}
    if len(answer.lower()) > 2 * sum(map(len, texts.values())):
        return None
    found = [choice for choice, text in texts.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def choices_of(row: Row) -> dict[str, Any]:
    """Return the options of a row: its columns A…Z that are not empty."""
    return {name: row[name] for name in string.ascii_uppercase if name in row and not missing(row[name])}


def row_letter(row: Row, *, verbose: bool = False) -> str | None:
    """Return the option that a row's answer names, or else the one in the judge's reply."""
    choices = choices_of(row)
    found = letter(prediction(row, "vlmevalkit"), choices, verbose=verbose)
    if found is None and not missing(row.get("judge")):
        found = letter(row["judge"], choices, verbose=verbose)
    return found


def score_choice(
    table: Table, *, meta: Table | None = None, split: str | None = None, mmmu: bool = False, verbose: bool = False
) -> Scores:
    """Return the accuracy of questions asked once.

    Args:
        table: rows with ``index``, options and ``answer``; groups are ``split``, ``l2-category`` and ``category``.
        meta: the question file, if the right answers are there.
        split: the split for the main score; by default all rows.
        mmmu: whether open questions (without option A) become a choice between the right answer, A, and "Other
            Answers".

    Raises:
        UserError: a row's index is not in ``meta``, or a column is missing.
    """
    right = _right_answers(table, meta)
    table = [_lower_columns(row) for row in table]
    if mmmu:
        table = [closed(row) for row in table]
        right = {index: answer if answer in set(string.ascii_uppercase) else "A" for index, answer in right.items()}
    found = [row_letter({**row, "prediction": prediction(row, "vlmevalkit").strip()}, verbose=verbose) for row in table]
    hits = [float(name == right[row["index"]]) for name, row in zip(found, table, strict=True)]
    unresolved = [i for i, name in enumerate(found) if name is None and missing(table[i].get("judge"))]
    return _report(table, hits, hits, unresolved, split)


def score_circular(
    table: Table, *, meta: Table | None = None, split: str | None = None, verbose: bool = False
) -> Scores:
    """Return the accuracy of questions asked once per rotation of their options: right only if every copy is.

    Copies have ``index`` plus k · 1,000,000, or name their original in ``g_index``. Groups and score are those of the
    first copy; the other rows have no score. Questions without their first copy do not count.
    """
    right = _right_answers(table, meta)
    table = [_lower_columns(row) for row in table]
    copies: dict[int, list[int]] = defaultdict(list)
    for position, row in enumerate(table):
        copies[int(row["g_index"] if "g_index" in row else row["index"] % 1_000_000)].append(position)
    found = [row_letter(row, verbose=verbose) for row in table]
    firsts = [i for i, row in enumerate(table) if row["index"] == row.get("g_index", row["index"] % 1_000_000)]
    hits: list[float] = []
    scores: list[float | None] = [None] * len(table)
    unresolved: list[int] = []
    for first in firsts:
        group = copies[int(table[first]["index"])]
        wrong = [i for i in group if found[i] is not None and found[i] != right[table[i]["index"]]]
        unnamed = [i for i in group if found[i] is None]
        hits.append(float(not wrong and not unnamed))
        scores[first] = hits[-1]
        unresolved += [] if wrong else [i for i in unnamed if missing(table[i].get("judge"))]
    return _report([table[i] for i in firsts], hits, scores, sorted(unresolved), split)


def _right_answers(table: Table, meta: Table | None) -> dict[Any, Any]:
    questions = table if meta is None else meta
    right = dict(zip(column(questions, "index"), column(questions, "answer"), strict=True))
    if unknown := [index for index in column(table, "index") if index not in right]:
        raise UserError(f"index {unknown[0]!r} is not in the question file")
    return right


def _lower_columns(row: Row) -> Row:
    # VLMEvalKit reads "L2-category" as "l2-category"; option columns keep their capital.
    return {name if name in string.ascii_uppercase else name.lower(): cell for name, cell in row.items()}


def closed(row: Row) -> Row:
    """Return an open question of MMMU as VLMEvalKit scores it: a choice of A, the right answer, or B, any other."""
    return {**row, "A": row["answer"], "B": "Other Answers"} if missing(row.get("A")) else row


def _report(
    table: Table, hits: list[float], scores: Sequence[float | None], unresolved: list[int], split: str | None
) -> Scores:
    """Return VLMEvalKit's table: each split's accuracy 0…1, overall and for each group of the whole table.

    Args:
        table, hits: the rows that count, and whether each is right.
        scores, unresolved: for all rows, to put into the result.
    """
    splits = [str(row.get("split", "none")) for row in table]
    groups: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(splits):
        here = [i for i, of_row in enumerate(splits) if of_row == name]
        metrics = {"Overall": mean(hits[i] for i in here)}
        for key in ("l2-category", "category"):
            for value in dict.fromkeys(row[key] for row in table if not missing(row.get(key))):
                label = _ABBREVIATIONS.get(value, str(value))
                metrics[label] = mean(hits[i] for i in here if table[i].get(key) == value)
        groups[name] = metrics
    if split is not None and split not in groups:
        raise UserError(f"the table has no split {split!r}; it has {', '.join(groups) or 'none'}")
    overall = mean(hits) if split is None else groups[split]["Overall"]
    return Scores("Overall", 100 * overall, {"Overall": overall}, groups, scores, judge=unresolved)
