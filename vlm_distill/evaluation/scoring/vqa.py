"""VQA accuracy: the normaliser and soft accuracy of the VQA challenge, and plain exact match.

The rules are those of https://github.com/GT-Vision-Lab/VQA (Antol et al. 2015, "VQA: Visual Question Answering"),
oddities included, so that scores compare with published ones, and the variants of VLMEvalKit and lmms-eval, which has a
second normaliser for TextVQA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from data.errors import UserError

from .cells import as_text, literal, prediction, reference_cell
from .scores import Row, Rules, Scores, Table, grouped, mean, missing
from .text_match import average

#: Ways to normalise an answer: those of the three rules, and lmms-eval's own for TextVQA.
Normaliser = Literal["official", "vlmevalkit", "lmms-eval", "lmms-eval-textvqa"]

_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_COMMAS_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIOD_APART_FROM_DIGITS = re.compile(r"(?<!\d)\.(?!\d)")

# Spelled correctly; each is also recognised with any one apostrophe missing. "I" is absent because the official table
# has it in upper case and looks it up in lower case; "let's" and "she's" because it maps them to themselves.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTED = {"somebody'd": "somebodyd"}
for _word in _CONTRACTIONS.split():
    for _apostrophe in re.finditer("'", _word):
        _CONTRACTED[_word[: _apostrophe.start()] + _word[_apostrophe.end() :]] = _word


def _flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str, rules: Normaliser = "official") -> str:
    """Return an answer as VQA evaluation compares it.

    In this order: line breaks and tabs become spaces; each punctuation mark is deleted if any one of its kind is next
    to a space or the text holds a number with a comma, and becomes a space otherwise; the first 32 periods
    not followed by a digit are deleted; words are lower-cased, numbers up to ten become digits ("none" becomes 0),
    articles are dropped and missing apostrophes put back.

    VLMEvalKit also keeps a period after a digit ("3."). lmms-eval accepts repeated commas in a number ("3,,5"); for
    TextVQA it first deletes commas and question marks and separates "'s" from its word.
    """
    if rules == "lmms-eval-textvqa":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    raw = _flatten(text)
    words = (_NUMBERS.get(word, word) for word in without_punctuation(raw, rules).lower().split())
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(raw: str, rules: Normaliser = "official") -> str:
    """The text after the two steps about punctuation and periods; see ``normalize``."""
    delete_all = bool((_COMMAS_IN_NUMBER if rules.startswith("lmms") else _COMMA_IN_NUMBER).search(raw))
    clean = raw
    for mark in _PUNCTUATION:
        delete = delete_all or f"{mark} " in raw or f" {mark}" in raw
        clean = clean.replace(mark, "" if delete else " ")
    # All three codes pass re.UNICODE, which is 32, where `sub` expects a count.
    return (_PERIOD_APART_FROM_DIGITS if rules == "vlmevalkit" else _PERIOD).sub("", clean, count=32)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction is one of the answers, else 0.0.

    The comparison ignores case, surrounding white space and one period at the end, and nothing else.
    """
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return VQA accuracy in 0…1: each answer is left out in turn, the others vote, and the scores are averaged.

    One vote is ``min(1, matches among the others / 3)``. As in the official code, prediction and answers are
    normalised only if the answers are not all the same. With a single reference, for which the official rule always
    gives 0, it is equality after normalisation, so that data sets with one reference per question get a score.

    Raises:
        ValueError: there is no answer to compare with.
    """
    if not answers:
        raise ValueError("soft accuracy needs at least one reference answer")
    if len(answers) == 1:
        return float(normalize(prediction) == normalize(answers[0]))
    return leave_one_out(prediction, answers)


def leave_one_out(
    prediction: str, answers: Sequence[str], rules: Normaliser = "official", *, ids: bool = True
) -> float:
    """Return VQA accuracy as the references compute it; a single reference always scores 0.

    Args:
        prediction, answers: raw texts.
        rules: whose normaliser; the official code normalises only if the answers are not all the same.
        ids: whether the answers are records with an ``answer_id``. Without it, the official code and lmms-eval's VQAv2
            leave out all equal answers together with the one.

    Returns:
        A score in 0…1; under VLMEvalKit NaN without answers.

    Raises:
        UserError: there is no answer, under the other rules.
    """
    if not answers:
        if rules == "vlmevalkit":
            return math.nan
        raise UserError("soft accuracy needs at least one reference answer")
    prediction, answers = _flatten(prediction), [_flatten(answer) for answer in answers]
    if rules != "official" or len(set(answers)) > 1:
        prediction, answers = normalize(prediction, rules), [normalize(answer, rules) for answer in answers]
    matches = [answer == prediction for answer in answers]
    votes = sum(matches)
    # Without ids, equal answers are left out together, so an answer that matches leaves no other match.
    left_out = matches if ids else [votes * match for match in matches]
    return mean(min(1.0, (votes - gone) / 3) for gone in left_out)


def reference_records(row: Row) -> tuple[list[str], bool]:
    """Return the answers of a VQA row, and whether they are distinguishable: texts are, records only by ``answer_id``.

    Raises:
        UserError: an answer is not text.
    """
    found = literal(row["answers"]) if "answers" in row else reference_cell(row)
    found = list(found) if isinstance(found, list | tuple) else [found]
    records = [answer for answer in found if isinstance(answer, Mapping)]
    texts = [as_text(answer["answer"] if isinstance(answer, Mapping) else answer, "an answer") for answer in found]
    return texts, all("answer_id" in record for record in records)


def score_vqa(table: Table, *, rules: Rules = "official", textvqa: bool = False) -> Scores:
    """Score VQAv2, OK-VQA and TextVQA: mean soft accuracy.

    Official scores are per cent, rounded to two decimals, also by ``answer_type`` and ``question_type``; the official
    means are over the questions' rounded scores. lmms-eval scores 0 if the references are hidden (``answers`` is empty,
    as in test splits); ``fallbacks`` counts these rows.

    Args:
        textvqa: use lmms-eval's normaliser for TextVQA under its rules.
    """
    who: Normaliser = "lmms-eval-textvqa" if textvqa and rules == "lmms-eval" else rules
    hidden = [rules == "lmms-eval" and missing(row.get("answers", ())) for row in table]
    scores = []
    for row, is_hidden in zip(table, hidden, strict=True):
        answers, ids = reference_records(row) if not is_hidden else ([], True)
        # VLMEvalKit, and lmms-eval for TextVQA, distinguish references by position.
        ids = ids or textvqa or rules == "vlmevalkit"
        scores.append(0.0 if is_hidden else leave_one_out(prediction(row, rules), answers, who, ids=ids))
    if rules != "official":
        result = average(table, scores, "exact_match", percent=rules == "vlmevalkit")
        return replace(result, fallbacks={"no reference": sum(hidden)})
    percents = [round(100 * score, 2) for score in scores]
    groups: dict[str, dict[str, float]] = {}
    for name in ("answer_type", "question_type"):
        of_group = grouped((row.get(name) for row in table), percents)
        groups |= {f"{name}: {key}": {"accuracy": round(mean(values), 2)} for key, values in of_group.items()}
    overall = round(mean(percents), 2) if percents else math.nan
    return Scores("accuracy", overall, {"accuracy": overall}, groups, scores)
