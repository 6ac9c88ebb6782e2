"""MM-Vet: a judge gives each answer 0 to 1; without a judge, whether the answer contains the right one.

Source: Yu et al. 2024, "MM-Vet". The references have no scores without a judge. The deterministic part is this
project's own, a substitute for watching a training run; it is not comparable with published scores.
"""

from __future__ import annotations

from data.errors import UserError

from .cells import column, prediction
from .scores import Row, Rules, Scores, Table, mean, missing


def contains_answer(answer: str, reference: str) -> bool:
    """Return whether all parts of one alternative are in the answer, ignoring case and runs of white space.

    In the right answers, ``<OR>`` separates alternatives and ``<AND>`` the parts of one.
    """
    text = _plain(answer)
    for alternative in reference.split("<OR>"):
        parts = alternative.split("<AND>")
        if all(_plain(part) in text for part in parts):
            return True
    return False


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def score_mmvet(table: Table, *, rules: Rules = "vlmevalkit") -> Scores:
    """Return the mean, in per cent, of the judge's scores in the column ``judge`` (0…1), or of containment if empty.

    Groups are the abilities in ``category`` or ``capability``, a list or text with commas. VLMEvalKit counts a question
    with a single ability twice in that ability's mean, once as a set of abilities. ``judge`` of the result lists the
    rows that no judge has seen.

    Raises:
        UserError: a judge's score is not in 0…1.
    """
    scores = []
    for row, right in zip(table, column(table, "answer"), strict=True):
        if missing(row.get("judge")):
            scores.append(float(contains_answer(prediction(row, "official"), str(right))))
        else:
            scores.append(_judged(row))
    abilities = [_abilities(row) for row in table]
    groups = {}
    for name in dict.fromkeys(name for found in abilities for name in found):
        graded = [s for s, found in zip(scores, abilities, strict=True) if name in found]
        if rules == "vlmevalkit":
            graded += [s for s, found in zip(scores, abilities, strict=True) if found == [name]]
        groups[name] = {"acc": 100 * mean(graded)}
    overall = 100 * mean(scores)
    unseen = [i for i, row in enumerate(table) if missing(row.get("judge"))]
    return Scores("acc", overall, {"acc": overall}, groups, scores, judge=unseen)


def _judged(row: Row) -> float:
    try:
        score = float(row["judge"])
    except (TypeError, ValueError):
        score = -1.0
    if not 0 <= score <= 1:
        raise UserError(f"a judge of MM-Vet gives 0 to 1, not {row['judge']!r}")
    return score


def _abilities(row: Row) -> list[str]:
    cell = row.get("category", row.get("capability"))
    if missing(cell):
        return []
    return [part.strip() for part in (cell.split(",") if isinstance(cell, str) else cell)]
