"""HallusionBench: accuracy of answers, figures and questions; a figure or question is right if all its answers are.

Source: Guan et al. 2024, "HallusionBench".
"""

from __future__ import annotations

from collections.abc import Sequence

from data.errors import UserError

from .cells import column, prediction
from .scores import Row, Rules, Scores, Table, grouped, mean, missing
from .yes_no import read_by_index

_PARTS = ("category", "subcategory", "set_id", "figure_id", "question_id")


def score_hallusion(table: Table, *, rules: Rules = "vlmevalkit") -> Scores:
    """Return aAcc, fAcc and qAcc; the main score is their mean, in per cent.

    VLMEvalKit takes set, figure and question from the 4th to 6th parts of ``index``, joined by ``_``; lmms-eval has
    them in columns. If every row has a judge's verdict in the column ``judge`` ("0" wrong, "1" right, "2" unclear),
    lmms-eval scores the verdicts, in per cent. Otherwise an answer is yes if it contains "yes" and no if not, 0…1.

    Raises:
        UserError: an index has too few parts, a column is missing, or a judged question occurs twice.
    """
    if rules == "vlmevalkit":
        return _by_index(table)
    judged = [not missing(row.get("judge")) for row in table]
    return _judged(table) if table and all(judged) else _by_yes(table)


def has_yes(answer: str) -> str:
    """Return "1" if the answer contains "yes", else "0", as lmms-eval does without a judge."""
    return "1" if "yes" in answer.lower() else "0"


def _by_index(table: Table) -> Scores:
    read = read_by_index(table)
    parts = [str(index).split("_") for index in column(table, "index")]
    if short := [row["index"] for row, found in zip(table, parts, strict=True) if len(found) < 6]:
        raise UserError(f"index {short[0]!r} of HallusionBench has no set, figure and question: six parts joined by _")
    fine = column(table, "l2-category")
    figures = [(kind, found[3], found[4]) for kind, found in zip(fine, parts, strict=True)]
    questions = [(kind, found[3], found[5]) for kind, found in zip(fine, parts, strict=True)]

    def metrics(rows: Sequence[int]) -> dict[str, float]:
        here = [read.scores[i] for i in rows]
        by_figure = grouped((figures[i] for i in rows), here)
        by_question = grouped((questions[i] for i in rows), here)
        return {
            "aAcc": 100 * mean(here),
            "fAcc": 100 * mean(map(min, by_figure.values())),
            "qAcc": 100 * mean(map(min, by_question.values())),
        }

    overall = metrics(range(len(table)))
    groups = {}
    for name in ("category", "l2-category"):
        for value in dict.fromkeys(row[name] for row in table if not missing(row.get(name))):
            groups[str(value)] = metrics([i for i, row in enumerate(table) if row.get(name) == value])
    return Scores("mean", mean(overall.values()), overall, groups, read.scores, read.fallbacks, read.judge)


def _by_yes(table: Table) -> Scores:
    for name in _PARTS:
        column(table, name)
    right = column(table, "gt_answer")
    hits = [float(has_yes(prediction(row, "lmms-eval")) == str(a)) for row, a in zip(table, right, strict=True)]
    by_figure = grouped((_key(row, "figure_id") for row in table), hits)
    by_question = grouped((_key(row, "question_id") for row in table), hits)
    overall = {
        "aAcc": mean(hits),
        "fAcc": mean(map(min, by_figure.values())),
        "qAcc": mean(map(min, by_question.values())),
    }
    guessed = sum("yes" not in (text := prediction(row, "lmms-eval").lower()) and "no" not in text for row in table)
    fallbacks = {"no for want of a yes": guessed}
    judge = range(len(table))
    return Scores("mean", 100 * mean(overall.values()), overall, {}, hits, fallbacks, judge)


def _judged(table: Table) -> Scores:
    for name in _PARTS:
        column(table, name)
    positions = [i for i, row in enumerate(table) if row["category"] in ("VD", "VS")]
    names = set()
    for i in positions:
        names.add(tuple(str(table[i][part]) for part in _PARTS))
    if len(names) < len(positions):
        raise UserError("a question of HallusionBench occurs twice")
    scores: list[float | None] = [None] * len(table)
    for i in positions:
        scores[i] = float(_verdict(table[i]))
    hits = [scores[i] or 0.0 for i in positions]
    # Rows without a figure do not count towards fAcc.
    seen = [i for i in positions if not _no_figure(table[i])]
    by_figure = grouped((_key(table[i], "figure_id") for i in seen), (scores[i] or 0.0 for i in seen))
    by_question = grouped((_key(table[i], "question_id") for i in positions), hits)
    overall = {
        "aAcc": round(100 * mean(hits), 4),
        "fAcc": round(100 * mean(map(min, by_figure.values())), 4),
        "qAcc": round(100 * mean(map(min, by_question.values())), 4),
    }
    return Scores("mean", mean(overall.values()), overall, {}, scores)


def _verdict(row: Row) -> bool:
    verdict = str(row["judge"])
    if verdict not in ("0", "1", "2"):
        raise UserError(f"a judge's verdict is 0, 1 or 2, not {verdict!r}")
    # "Unclear" is the right verdict if no figure is shown.
    return verdict == "1" or (verdict == "2" and _no_figure(row))


def _no_figure(row: Row) -> bool:
    return row["category"] == "VS" and str(row["figure_id"]) == "0"


def _key(row: Row, part: str) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("category", "subcategory", "set_id", part))
