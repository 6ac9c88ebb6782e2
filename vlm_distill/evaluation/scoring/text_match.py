"""Compare answers as text or numbers: ANLS (DocVQA, InfoVQA), relaxed accuracy (ChartQA), exact match (GQA, OCR-VQA).

Sources: ANLS in Biten et al. 2019, "Scene Text Visual Question Answering"; relaxed accuracy in Masry et al. 2022,
"ChartQA"; the details, on which scores depend, follow VLMEvalKit and lmms-eval.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from data.errors import UserError

from .cells import column, literal, prediction, reference_cell, references
from .scores import Row, Rules, Scores, Table, grouped, mean

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def anls(prediction: str, answers: Sequence[str], *, rules: Rules = "vlmevalkit", threshold: float = 0.5) -> float:
    """Return the average normalised Levenshtein similarity with the nearest answer, 0…1; 0 below the threshold.

    The distance is between the lower-cased texts with single spaces, but it is divided by the length of the longer
    *raw* text, so surplus spaces raise a score (the prediction's only under VLMEvalKit, since lmms-eval strips it).
    Two empty texts score 1.

    Raises:
        UserError: there is no answer to compare with.
    """
    if not answers:
        raise UserError("ANLS needs at least one reference answer")
    if rules != "vlmevalkit":
        prediction = prediction.strip()
    best = max(_similarity(prediction, answer, threshold) for answer in dict.fromkeys(answers))
    return best if best >= threshold else 0.0


def _similarity(prediction: str, answer: str, threshold: float) -> float:
    # Both references measure the length of upper-cased texts, in which "ß" is two letters.
    length = max(len(prediction.upper()), len(answer.upper()))
    found, right = _plain(prediction), _plain(answer)
    if not length or found == right:
        return 1.0
    # The distance is at least the difference of lengths, so rambling answers need no comparison.
    if 1 - abs(len(found) - len(right)) / length < threshold:
        return 0.0
    return 1 - levenshtein(found, right) / length


def levenshtein(a: str, b: str) -> int:
    """Return the least number of character insertions, deletions and substitutions that turn ``a`` into ``b``."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def relaxed_match(prediction: str, answer: str, *, tolerance: float = 0.05) -> bool:
    """Return whether two numbers differ by at most 5 % of the right one, or two texts are equal but for case.

    A per cent sign divides by 100: "20%" is right for "0.2" and wrong for "20". If the right answer is zero, or Python
    cannot read one of them as a number ("1,000"), the texts are compared. Both references strip the prediction.
    """
    prediction = prediction.strip()
    found, right = _number(prediction), _number(answer)
    if found is None or not right:
        return prediction.lower() == answer.lower()
    return abs(found - right) / abs(right) <= tolerance  # false for NaN, as in the references


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def same_text(prediction: str, answer: str, *, rules: Rules = "vlmevalkit") -> bool:
    """Return whether two answers are the same text, for GQA and OCR-VQA.

    VLMEvalKit ignores case and surrounding space; lmms-eval ignores case and ASCII punctuation anywhere, so only there
    "Yes." is right for "yes".
    """
    if rules == "vlmevalkit":
        return prediction.strip().lower() == answer.strip().lower()
    return _numpy_plain(prediction.strip()) == _numpy_plain(answer)


def _numpy_plain(text: str) -> str:
    # lmms-eval does this in a numpy array, whose cells keep their width ("İ" has two letters in lower case) and drop
    # trailing NULs as padding.
    return text.lower()[: max(len(text), 1)].translate(_NO_PUNCTUATION).rstrip("\0")


def score_anls(table: Table, *, rules: Rules = "vlmevalkit") -> Scores:
    """Score DocVQA and InfoVQA: mean ANLS."""
    return _average(table, [anls(prediction(row, rules), references(row), rules=rules) for row in table], rules, "anls")


def score_relaxed(table: Table, *, rules: Rules = "vlmevalkit") -> Scores:
    """Score ChartQA: mean relaxed accuracy, with the best reference of each question.

    Raises:
        UserError: a row has no reference.
    """
    scores = []
    for row in table:
        answers = relaxed_references(row)
        scores.append(float(any(relaxed_match(prediction(row, rules), answer) for answer in answers)))
    if rules == "vlmevalkit":
        return _average(table, scores, rules, "relaxed_accuracy")
    human = [kind == "human_test" for kind in column(table, "type")]
    groups = {}
    for name, wanted in (("relaxed_human_split", True), ("relaxed_augmented_split", False)):
        of_split = [score for score, is_human in zip(scores, human, strict=True) if is_human == wanted]
        if of_split:
            groups[name] = {"relaxed_accuracy": mean(of_split)}
    overall = mean(scores)
    return Scores("relaxed_overall", 100 * overall, {"relaxed_overall": overall}, groups, scores)


def relaxed_references(row: Row) -> list[str]:
    """Return the right answers as text, numbers included, which the other rules refuse.

    Raises:
        UserError: there is none.
    """
    found = literal(row["answers"]) if "answers" in row else reference_cell(row)
    answers = [str(answer) for answer in (found if isinstance(found, list | tuple) else [found])]
    if not answers:
        raise UserError("relaxed accuracy needs at least one reference answer")
    return answers


def score_exact(table: Table, *, rules: Rules = "vlmevalkit", best: bool = False) -> Scores:
    """Score GQA, or with ``best`` OCR-VQA: the share of answers equal to the reference.

    With several references, VLMEvalKit averages for GQA (NaN without any) and takes the best for OCR-VQA.

    Raises:
        UserError: with ``best``, a row has no reference.
    """
    scores = []
    for row in table:
        matches = [float(same_text(prediction(row, rules), answer, rules=rules)) for answer in references(row)]
        if best and not matches:
            raise UserError("a row has no reference answer")
        scores.append(max(matches) if best else mean(matches))
    return _average(table, scores, rules, "exact_match")


def _average(table: Table, scores: list[float], rules: Rules, metric: str) -> Scores:
    return average(table, scores, metric, percent=rules == "vlmevalkit")


def average(table: Table, scores: Sequence[float], metric: str, *, percent: bool = True) -> Scores:
    """Return the mean of row scores, overall and by split or else category, as VLMEvalKit groups its VQA tables."""
    scale = 100.0 if percent else 1.0
    groups: dict[str, dict[str, float]] = {}
    for name in ("split", "category"):
        if any(name in row for row in table):
            of_rows = grouped((row.get(name) for row in table), scores)
            groups = {str(key): {metric: scale * mean(values)} for key, values in of_rows.items()}
            break
    overall = mean(scores)
    return Scores(metric, 100 * overall, {metric: scale * overall}, groups, list(scores))
