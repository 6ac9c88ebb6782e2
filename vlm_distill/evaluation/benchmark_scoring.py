"""Score answers to a benchmark by its rules, with a judge or without."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from data.batch import Problem
from data.errors import BadSample, UserError

from .benchmark_entry import Benchmark, Rules
from .benchmark_questions import BenchmarkQuestions
from .benchmark_results import Result
from .judge import UNREADABLE, Judge, ask_judge
from .left_out import main_reason
from .predictions import Prediction
from .prompts import options
from .question_source import share
from .scoring.scorers import rules_of, score
from .scoring.scores import Scores
from .vlmevalkit_files import read_back

#: Scorers of answers that are yes or no.
YES_OR_NO = ("pope", "mme", "hallusionbench")
# An answer that all rules accept for any question.
_STAND_IN = "unanswered"


def score_answers(
    entry: Benchmark,
    questions: BenchmarkQuestions,
    predictions: Sequence[Prediction],
    rules: Rules,
    judge: Judge | None = None,
    skipped: Sequence[Problem] = (),
) -> tuple[Result, list[dict[str, Any]]]:
    """Score answers to a benchmark; return the result, and the answered rows as scorers take them.

    If one of several questions that are scored together has no answer, all of them are left out and counted. If
    nothing can be scored, the result's ``failure`` says why, and no answer is lost.
    """
    rows = answered(questions, predictions)
    broken = questions.incomplete(p.index for p in predictions)
    left_out = [*skipped]
    left_out += [
        Problem(entry.name, p.line, "another of its group has no answer") for p in predictions if p.index in broken
    ]
    kept = [place for place, p in enumerate(predictions) if p.index not in broken]
    limited = len(predictions) + len(skipped) < len(questions)
    scores, failure = None, None
    if not predictions:
        failure = f"no question could be asked: {main_reason(skipped)}"
    elif not kept:
        failure = f"no group of questions that are scored together is complete: {main_reason(skipped)}"
    elif any(published(rows[place]) for place in kept):
        try:
            scored = [rows[place] for place in kept]
            scores = judged(entry, scored, rules, judge, partial=limited or bool(left_out))
        except UserError as error:
            failure = str(error)
    out_of, predictions = entry.out_of, list(predictions)
    if scores is not None:
        out_of = best_possible(entry, scores)
        by_place = dict(zip(kept, scores.rows, strict=True))
        predictions = [replace(p, score=by_place.get(place)) for place, p in enumerate(predictions)]
    result = Result(
        entry.name,
        entry.metric,
        rules,
        predictions,
        scores,
        left_out,
        out_of,
        questions=len(questions),
        limited=limited,
        failure=failure,
    )
    return result, rows


def best_possible(entry: Benchmark, scores: Scores) -> float:
    """Return the main score that a model would have if it were always right on the scored questions."""
    if "question" in entry.worth:
        return entry.worth["question"] * sum(found is not None for found in scores.rows)
    if "group" in entry.worth:
        return entry.worth["group"] * len(scores.groups)
    return entry.out_of


def answered(questions: BenchmarkQuestions, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return the answered rows as scorers take them."""
    return [questions.row(p.index) | {"prediction": p.answer} for p in predictions]


def _readable(questions: BenchmarkQuestions, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
    found = {}
    for index in indices:
        with suppress(BadSample):
            found[index] = questions.row(index)
    return found


def _options(entry: Benchmark, *, partial: bool) -> dict[str, Any]:
    return {**entry.scorer_options, "partial": True} if entry.worth and partial else dict(entry.scorer_options)


def published(row: dict[str, Any]) -> bool:
    """Whether a row's right answer is known."""
    return row.get("answer") is not None or row.get("answers") is not None


def judged(
    entry: Benchmark, rows: list[dict[str, Any]], rules: str, judge: Judge | None, *, partial: bool = False
) -> Scores:
    """Score answered rows; a judge first fills the column ``judge`` of those that the rules leave to it.

    VLMEvalKit scores what it reads back from its prediction file, where "7" may have become 7.0 and "N/A" empty. Its
    rules do the same here.

    Args:
        partial: whether some of the benchmark's rows are missing.
    """
    settings = _options(entry, partial=partial)
    if rules == "vlmevalkit":
        rows = read_back(rows)
    scores = score(entry.scorer, rows, rules, **settings)
    if judge is not None and scores.judge:
        unreadable = ask_judge(judge, entry.scorer, rules, [rows[i] for i in scores.judge])
        scores = score(entry.scorer, rows, rules, **settings)
        scores = replace(scores, fallbacks={**scores.fallbacks, UNREADABLE: unreadable})
    return scores


def check_questions(
    entry: Benchmark, questions: BenchmarkQuestions, rules: str, *, limit: int | None, likelihood: bool
) -> None:
    """Raise ``UserError`` if the files alone show that answers could not be scored.

    Scores the rows with placeholder answers, so that hours of answering do not end in a refusal that was foreseeable.
    """
    asked = share(questions, limit)
    rows = _readable(questions, asked)
    if likelihood and entry.scorer not in YES_OR_NO and not all(map(options, rows.values())):
        raise UserError(f"{entry.name}: a question has no options to choose from by likelihood; leave --score out")
    broken = questions.incomplete(asked)
    complete = [row | {"prediction": _STAND_IN} for index, row in rows.items() if index not in broken]
    if any(map(published, complete)):
        judged(entry, complete, rules, None, partial=len(asked) < len(questions) or bool(broken))


def check_rules(entry: Benchmark, rules: str) -> None:
    """Raise ``UserError`` if a benchmark cannot be scored by these rules."""
    known = rules_of(entry.scorer)
    if rules not in known:
        raise UserError(f"{entry.name} has no rules {rules!r}; it has {', '.join(known)}")
