"""OCRBench: a question is right if the answer contains a reference; the score is the number of right questions.

Source: Liu et al. 2024, "OCRBench: On the Hidden Mystery of OCR in Large Multimodal Models".
"""

from __future__ import annotations

from collections.abc import Sequence

from data.errors import UserError

from .cells import as_text, column, literal, prediction
from .scores import Row, Rules, Scores, Table

_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
_OTHERS = (
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)
_QUESTIONS = 1000
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def contains(answer: str, reference: str, *, formula: bool = False, rules: Rules = "vlmevalkit") -> bool:
    """Return whether the answer contains the reference.

    A line break is a space. In formulas, all spaces are removed and case counts. Elsewhere, surrounding space and
    case are ignored, and lmms-eval reads full-width ASCII as plain.
    """
    return _plain(reference, formula, rules) in _plain(answer, formula, rules)


def _plain(text: str, formula: bool, rules: Rules) -> str:
    if formula:
        return text.strip().replace("\n", " ").replace(" ", "")
    if rules == "lmms-eval":
        text = text.translate(_HALF_WIDTH)
    return text.lower().strip().replace("\n", " ")


def ocr_references(row: Row, rules: Rules) -> Sequence[str]:
    """Return the right answers of a row.

    VLMEvalKit evaluates the cell, and iterates over a bare string letter by letter. lmms-eval takes a list or a text.

    Raises:
        UserError: the cell is not a literal of text or of several.
    """
    if rules == "lmms-eval":
        found = row["answer"]
        found = [found] if isinstance(found, str) else found
    else:
        found = row["answers"] if "answers" in row else row.get("answer")
        value = literal(found)
        if isinstance(found, str) and value == found:
            raise UserError(f"the answer {found!r} of OCRBench is not a list")
        found = value
    if not isinstance(found, list | tuple | str):
        raise UserError(f"the answer {found!r} of OCRBench is not a list")
    return [as_text(answer, "an answer of OCRBench") for answer in found]


def row_hit(row: Row, rules: Rules = "vlmevalkit") -> bool:
    """Return whether a row's answer is right.

    Raises:
        UserError: OCRBench has no such category (VLMEvalKit), or the reference is malformed.
    """
    lmms = rules == "lmms-eval"
    formula = row.get("dataset") == "HME100k" if lmms else _category(row["category"]) == _OTHERS[-1]
    answer = prediction(row, rules)
    return any(contains(answer, found, formula=formula, rules=rules) for found in ocr_references(row, rules))


def _category(name: str) -> str:
    if name not in (*_RECOGNITION, *_OTHERS):
        raise UserError(f"OCRBench has no category {name!r}")
    return name


def score_ocrbench(table: Table, *, rules: Rules = "vlmevalkit", partial: bool = False) -> Scores:
    """Count right answers, 0…1000; ``Final Score Norm`` is a tenth of that, lmms-eval's accuracy a thousandth.

    With ``partial``, these two are the percentage and share of the questions in the table.
    """
    total = max(1, len(table)) if partial else _QUESTIONS
    kinds = [_category(name) for name in column(table, "question_type" if rules == "lmms-eval" else "category")]
    hits = [float(row_hit(row, rules)) for row in table]
    right = dict.fromkeys((*_RECOGNITION, *_OTHERS), 0)
    for kind, hit in zip(kinds, hits, strict=True):
        right[kind] += int(hit)
    groups = {kind: {"right": float(right[kind]), "questions": float(kinds.count(kind))} for kind in right}
    final = sum(right.values())
    if rules == "lmms-eval":
        return Scores("ocrbench_accuracy", float(final), {"ocrbench_accuracy": final / total}, groups, hits)
    overall = {"Text Recognition": float(sum(right[kind] for kind in _RECOGNITION))}
    overall |= {kind: float(right[kind]) for kind in _OTHERS}
    overall |= {"Final Score": float(final), "Final Score Norm": 100 * final / total}
    return Scores("Final Score", float(final), overall, groups, hits)
