"""MMMU by its official parser and by lmms-eval's; VLMEvalKit's is in ``multiple_choice_vlmevalkit``.

Source: Yue et al. 2024, "MMMU", and its evaluation code. Both references guess if an answer names no option; here such
an answer has no letter, is wrong, and is counted.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from itertools import chain, product

from data.errors import UserError

from .cells import as_text, column, literal, prediction
from .scores import Row, Rules, Scores, Table, grouped, mean, missing

#: Normalised answers: numbers, rounded to two decimals, and lower-case texts.
Parsed = list[float | str]

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234,567
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.5e-3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 1.5, .5, 15, not part of the others
)


def choice(answer: str, options: Mapping[str, str], *, rules: Rules = "official") -> str | None:
    """Return the letter that an answer names, or ``None`` where the references guess.

    Letters in brackets come first, then letters between spaces, then, in answers of more than five words, options whose
    text is in the answer. Among several, the last occurrence wins. lmms-eval needs no space before a letter, so "DNA is
    the molecule" names A, and tries letters before a period next.

    Args:
        options: letter → text.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    # Patterns that find a letter, and that then tell which of several occurs last.
    forms = [("({})", "({})"), (" {} ", " {} ")]
    if rules == "lmms-eval":
        forms = [("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")]
    for form, place in forms:
        if found := [letter for letter in options if form.format(letter) in text]:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) > 5:
        low = text.lower()
        if found := [letter for letter, option in options.items() if option.lower() in low]:
            return max(found, key=lambda letter: low.rfind(options[letter].lower()))
    return None


def open_answers(answer: str) -> Parsed:
    """Return what an answer to an open question may mean, without repetitions, in the order found.

    These are each line's shortest tail after a word such as "is" or "answer" (in the last line also after "="), or the
    whole answer if no line has one; then every number in them.
    """
    answer = answer.strip().strip(".").lower()
    lines = answer.split("\n")
    tails = []
    for number, line in enumerate(lines):
        keys = (*_KEYS, "=") if number == len(lines) - 1 else _KEYS
        found = [line.rsplit(key, 1)[1].strip() for key in keys if key in line]
        # As in the reference, an empty tail gives way to the next, however long.
        tail = ""
        for candidate in found:
            if not tail or len(candidate) < len(tail):
                tail = candidate
        if tail and tail not in set(":,.!?;'"):
            tails.append(tail)
    texts = tails or [answer]
    numbers = []
    for text in texts:
        for pattern in _NUMBERS:
            numbers += re.findall(pattern, text)
    return list(dict.fromkeys(_all_normalised([*texts, *numbers])))


def _all_normalised(texts: Sequence[str]) -> Parsed:
    return list(chain.from_iterable(normalised(text) for text in texts))


def normalised(text: str) -> Parsed:
    """Return a text as a number rounded to two decimals, if it is one, or else in lower case.

    A single letter becomes two texts, with a space before and after, so that it is not found in every word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        pass
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_match(parsed: Parsed, gold: str | Sequence[str], *, rules: Rules = "official") -> bool:
    """Return whether a parsed number is right, or a parsed text contains a right text.

    lmms-eval compares the letters of the first parsed answer one by one, so it only ever finds an empty right answer.
    """
    right = _all_normalised([gold] if isinstance(gold, str) else gold)
    if rules == "lmms-eval":
        return "" in right and parsed[:1] != [""]
    numbers = [value for value in parsed if not isinstance(value, str)]
    texts = [value for value in parsed if isinstance(value, str)]
    contained = any(value in text for value, text in product(right, texts) if isinstance(value, str))
    return contained or any(number in right for number in numbers)


def choice_match(letter: str | None, gold: str | Sequence[str]) -> bool:
    """Return whether the letter is the right one, or one of several right ones."""
    return letter is not None and (letter == gold if isinstance(gold, str) else letter in gold)


def subject(question: str) -> str:
    """Return the subject in a question's id: "Art_Theory" for "validation_Art_Theory_12".

    Raises:
        UserError: the id has another form.
    """
    found = re.fullmatch(r"[^_]*_(.+?)_\d+", question, re.DOTALL)
    if found is None:
        raise UserError(f"{question!r} is not an id of MMMU: split, subject and number joined by _")
    return found[1]


def score_mmmu(table: Table, *, rules: Rules = "official") -> Scores:
    """Return accuracy 0…1, overall and by subject; lmms-eval rounds it to five decimals.

    Rows have ``id``, ``question_type`` ("multiple-choice" or else open), ``options`` (texts) and ``answer``; the answer
    to score is in ``prediction`` or ``response``. An empty table scores 0, as in the official code.
    """
    names = [subject(as_text(question, "an id of MMMU")) for question in column(table, "id")]
    hits, guessed = [], 0
    for row in table:
        answer = as_text(row["response"], "a response") if "response" in row else prediction(row, rules)
        gold = row["answer"] if isinstance(row["answer"], str | list) else str(row["answer"])
        if row.get("question_type") == "multiple-choice":
            letter = choice(answer, _options(row), rules=rules)
            guessed += letter is None
            hits.append(float(choice_match(letter, gold)))
        else:
            hits.append(float(open_match(open_answers(answer), gold, rules=rules)))
    groups = {name: {"acc": mean(values)} for name, values in grouped(names, hits).items()}
    overall = mean(hits) if hits else 0.0
    if rules == "lmms-eval":
        overall = round(overall, 5)
        groups = {name: {"acc": round(metrics["acc"], 5)} for name, metrics in groups.items()}
    return Scores("acc", 100 * overall, {"acc": overall}, groups, hits, {"random": guessed})


def _options(row: Row) -> dict[str, str]:
    options = literal(row.get("options"))
    if missing(options) or not isinstance(options, list | tuple):
        raise UserError(f"the options of {row['id']} are not a list")
    lettered = zip(string.ascii_uppercase, options, strict=False)
    return {letter: str(option) for letter, option in lettered if not missing(option)}
