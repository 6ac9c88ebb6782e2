"""Multiple choice as lmms-eval scores it: a rule for each benchmark, without a judge."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from itertools import product

from data.errors import UserError

from .cells import column, literal, prediction
from .scores import Row, Scores, Table, grouped, mean, missing
from .text_match import average, same_text

#: Phrases before an answer, in lower case. Their first occurrence counts.
_PHRASES = (
    *(
        f"{the}{thing} is"
        for the, thing in product(
            ("", "the "),
            ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice"),
        )
    ),
    *(f"i {verb}" for verb in ("choose", "select", "pick")),
    *(f"my {noun} is" for noun in ("answer", "choice")),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
#: How a letter may be written, with its rank; its last occurrence counts.
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
#: How MMBench's first step recognises a letter among the words, in order.
_MMBENCH_FORMS = (
    *("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({})."),
    *(":{}", ":{},", ":{}.", ":{})", ":{})."),
)
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0


def extract_letter(answer: str, choices: Sequence[str] | None = None) -> str:
    """Return the option letter of an answer, or "": MMStar, RealWorldQA, and MMBench if its own rules find nothing.

    Each way to write a letter has a rank. The highest wins, and among equals the last: alone at the start, alone at the
    end, after a phrase such as "the answer is", "(A)", "A.", "A:", "A)", "A ", anywhere.

    Args:
        choices: capital letters; A…H by default.
    """
    letters = choices or string.ascii_uppercase[:8]
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare = text.strip()
    text = f" {text} "
    if not bare:
        return ""
    found: list[tuple[int, int, str]] = []  # rank, place, letter
    for form, rank in _FORMS:
        found += [(rank, text.rfind(form.format(x)), x) for x in letters if form.format(x) in text]
    # As in lmms-eval, positions are those of the lower-cased text, in which "İ" is two characters.
    for phrase in _PHRASES:
        if (place := text.lower().find(phrase)) >= 0:
            after = place + len(phrase)
            found += [(_PHRASE, text.find(x, after), x) for x in letters if x in text[after:]]
    found += [(_START, 0, x) for x in letters if bare.startswith(x) and not bare[1:2].isalpha()]
    found += [(_END, len(text) - 1, x) for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()]
    found = found or [(_ANYWHERE, text.rfind(x), x) for x in letters if x in text]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else ""


def ai2d_letter(answer: str) -> str:
    """Return AI2D's answer: the capital letter before a period at the start, or else the whole text."""
    found = re.match(r"\s*([A-Z])\.", answer)
    return found[1] if found else answer


def option_letter(index: object, options: Sequence[str]) -> str:
    """Return the letter of the option at ``index``, a number or its text, from 0; negative ones count from the end.

    Raises:
        UserError: there is no such option.
    """
    try:
        position = int(str(index))
    except ValueError:
        raise UserError(f"the reference answer {index!r} is not the index of an option") from None
    if not -len(options) <= position < len(options):
        raise UserError(f"the reference answer {index!r} is not one of {len(options)} options")
    return string.ascii_uppercase[: len(options)][position]


def scienceqa_match(answer: str, target: str) -> bool:
    """Return whether an answer to ScienceQA is the letter alone, in either case, or starts with it and a period."""
    answer = answer.strip()
    if answer.lower() == target.lower():
        return True
    return answer[1:2] == "." and answer[0].isupper() and answer[0].lower() == target.lower()


def mmstar_match(answer: str, target: str) -> bool:
    """Return whether the letter extracted from an answer to MMStar, of A…D, is the right one."""
    return extract_letter(answer, "ABCD") == target.strip().upper()


def realworldqa_match(answer: str, target: str) -> bool:
    """Return whether a RealWorldQA answer is right: as in MMStar for a letter, else equal but for case and periods."""
    target = target.strip()
    if target.upper() in ("A", "B", "C", "D"):
        return mmstar_match(answer, target)
    return answer.lower().strip().rstrip(".") == target.lower()


def seedbench_letter(answer: str) -> str:
    """Return SEEDBench's answer: the first character, whatever it is."""
    return answer.strip()[:1]


def seedbench_match(answer: str, target: str) -> bool:
    """Return whether the first character of an answer to SEEDBench is the letter, in either case."""
    return seedbench_letter(answer).lower() == target.lower().strip()


def score_ai2d(table: Table) -> Scores:
    """Score AI2D: ``answer`` is an option's index as text, ``options`` are their texts."""
    right = [option_letter(row["answer"], literal(row["options"])) for row in _need(table, "answer", "options")]
    letters = [ai2d_letter(prediction(row, "lmms-eval")) for row in table]
    return _accuracy([same_text(a, b, rules="lmms-eval") for a, b in zip(letters, right, strict=True)])


def score_scienceqa(table: Table) -> Scores:
    """Score ScienceQA: ``answer`` is an option's index, ``choices`` are their texts."""
    right = [option_letter(row["answer"], literal(row["choices"])) for row in _need(table, "answer", "choices")]
    return _accuracy([scienceqa_match(prediction(row, "lmms-eval"), a) for row, a in zip(table, right, strict=True)])


def score_realworldqa(table: Table) -> Scores:
    """Score RealWorldQA: ``answer`` is a letter, a word or a number."""
    right = [str(answer) for answer in column(table, "answer")]
    return _accuracy([realworldqa_match(prediction(row, "lmms-eval"), a) for row, a in zip(table, right, strict=True)])


def score_mmstar(table: Table) -> Scores:
    """Score MMStar: the mean over the ``l2_category`` means, not over questions; also within each ``category``."""
    right = [str(answer) for answer in column(table, "answer")]
    hits = [float(mmstar_match(prediction(row, "lmms-eval"), a)) for row, a in zip(table, right, strict=True)]
    kinds, fine = column(table, "category"), column(table, "l2_category")

    def of_means(rows: Sequence[int]) -> float:
        return mean(map(mean, grouped((fine[i] for i in rows), (hits[i] for i in rows)).values()))

    groups = {}
    for kind in dict.fromkeys(kinds):
        groups[str(kind)] = {"average": of_means([i for i, other in enumerate(kinds) if other == kind])}
    overall = of_means(range(len(table)))
    return Scores("average", 100 * overall, {"average": overall}, groups, hits)


def score_seedbench(table: Table) -> Scores:
    """Score SEEDBench: accuracy of all questions, and of each ``data_type`` (image, video)."""
    right = [str(answer) for answer in column(table, "answer")]
    hits = [float(seedbench_match(prediction(row, "lmms-eval"), a)) for row, a in zip(table, right, strict=True)]
    kinds = grouped(column(table, "data_type"), hits)
    groups = {f"seed_{kind}": {"accuracy": mean(values)} for kind, values in kinds.items()}
    return Scores("seed_all", 100 * mean(hits), {"seed_all": mean(hits)}, groups, hits)


def mmbench_letter(answer: str, choices: dict[str, object]) -> str | None:
    """Return the option that an answer to MMBench names by the first step, or ``None``.

    It is the only letter of A…E that is a word ("A" only in answers of at most three words), alone or with one of
    twelve punctuations; or else the only option whose text is in the answer.
    """
    if "Failed to obtain answer via API" not in answer:
        words = answer.split()
        for form in _MMBENCH_FORMS:
            named = [x for x in "ABCDE" if form.format(x) in words]
            quantifier = form == "{}" and "A" in words and len(words) > 3
            if len(named) == 1 and not quantifier:
                return named[0]
    found = [x for x, text in choices.items() if str(text).lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def _with_lower_case_columns(row: Row) -> Row:
    """Return the row with its columns in lower case, except for the options' letters."""
    return {name if name in "ABCD" else name.lower(): cell for name, cell in row.items()}


def score_mmbench(table: Table) -> Scores:
    """Score circular MMBench by lmms-eval's static rules: a question is right if all its copies are.

    If no copy is wrong, copies whose answer names no option are read once more by ``extract_letter``.
    """
    table = [_with_lower_case_columns(row) for row in table]
    indices = column(table, "index")
    by_question: dict[int, list[Row]] = {}
    for index, row in zip(indices, table, strict=True):
        by_question.setdefault(index % 1_000_000, []).append(row)
    hits: dict[int, float] = {}
    second = 0
    for first in (i for i, index in enumerate(indices) if index < 1_000_000):
        copies = by_question[indices[first]]
        found = [mmbench_letter(prediction(row, "lmms-eval"), _four(row)) for row in copies]
        right = [row["answer"] for row in copies]
        if any(name not in (None, answer) for name, answer in zip(found, right, strict=True)):
            hits[first] = 0.0
            continue
        second += sum(name is None for name in found)
        found = [
            name or extract_letter(prediction(row, "lmms-eval"), sorted(_four(row)))
            for name, row in zip(found, copies, strict=True)
        ]
        hits[first] = float(found == right)
    groups: dict[str, dict[str, float]] = {}
    for key in ("category", "l2-category"):
        of_group = grouped((table[i].get(key) for i in hits), hits.values())
        groups |= {f"{key}: {value}": {"accuracy": mean(values)} for value, values in of_group.items()}
    overall = mean(hits.values())
    rows = [hits.get(i) for i in range(len(table))]
    fallbacks = {"a letter looked for anywhere": second}
    return Scores("overall", 100 * overall, {"overall": overall}, groups, rows, fallbacks)


def _four(row: Row) -> dict[str, object]:
    return {name: row[name] for name in "ABCD" if not missing(row.get(name))}


def _need(table: Table, *names: str) -> Table:
    for name in names:
        column(table, name)
    return table


def _accuracy(hits: Sequence[bool]) -> Scores:
    return average((), [float(hit) for hit in hits], "exact_match", percent=False)
