"""Score answers to a benchmark by its rules, and write the scores: ``scores.json``, ``scores.csv`` and predictions."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.batch import Problem
from data.errors import BadSample, UserError

from .benchmark_entry import Benchmark, Rules
from .benchmark_questions import BenchmarkQuestions
from .benchmarks import LEADERBOARD
from .judge import UNREADABLE, Judge, ask_judge
from .left_out import main_reason
from .predictions import Prediction, write_predictions
from .prompts import options
from .question_source import share
from .scoring.leaderboard import suite_average
from .scoring.scorers import rules_of, score
from .scoring.scores import Scores
from .vlmevalkit_files import default_format, prediction_file, read_back, write_prediction_file

#: Scorers of answers that are yes or no.
YES_OR_NO = ("pope", "mme", "hallusionbench")
# An answer that all rules accept for any question.
_STAND_IN = "unanswered"


@dataclass(frozen=True)
class Result:
    """One benchmark's answers and scores.

    Attributes:
        benchmark: its name.
        metric: the usual name of the main score.
        rules: whose rules scored it.
        predictions: with their scores.
        scores: ``None`` if the right answers are not published, or for the reason in ``failure``.
        skipped: questions that could not be asked, and answers that cannot be scored without the rest of their group.
        out_of: the main score of a model that is always right on these questions.
        questions: number of questions in the benchmark's files.
        limited: whether a limit left some of them out.
        failure: why there are no scores, in one line.
    """

    benchmark: str
    metric: str
    rules: str
    predictions: list[Prediction]
    scores: Scores | None
    skipped: list[Problem]
    out_of: float = 100.0
    questions: int = 0
    limited: bool = False
    failure: str | None = None

    @property
    def n(self) -> int:
        """Number of answers that were scored."""
        return len(self.predictions) if self.scores is None else len(self.scores.rows)

    @property
    def cut(self) -> int:
        """Number of answers that were cut before their end."""
        return sum(not p.complete for p in self.predictions)

    @property
    def whole(self) -> bool:
        """Whether all of the benchmark's questions were scored."""
        return self.scores is not None and not self.limited and not self.skipped

    def notes(self) -> list[str]:
        """Return short remarks on the scores, except on cut answers, which have a column of their own."""
        notes = []
        if self.failure is not None:
            notes.append(f"not scored: {self.failure}")
        elif self.scores is None:
            notes.append("right answers are not published: predictions only")
        if self.limited:
            notes.append(f"limited: {self.n + len(self.skipped):,} of {self.questions:,} questions")
        if self.skipped:
            notes.append(f"{len(self.skipped):,} left out")
        if self.scores is not None:
            notes += [f"{count:,} decided by {reason}" for reason, count in self.scores.fallbacks.items() if count]
            if self.scores.judge:
                count = len(self.scores.judge)
                notes.append(f"{count:,} {'answer needs' if count == 1 else 'answers need'} a judge (--judge)")
        return notes


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


def average(results: Sequence[Result]) -> float | None:
    """Return the Open VLM Leaderboard's average, defined over eight benchmarks by VLMEvalKit's rules.

    ``None`` unless all eight are there, each with all of its questions scored by these rules.
    """
    names = LEADERBOARD
    usable = [r for r in results if r.benchmark in names and r.rules == "vlmevalkit" and r.whole]
    return suite_average({names[r.benchmark]: r.scores.main for r in usable if r.scores is not None})


def summary(result: Result) -> dict[str, Any]:
    """Return a result without its answers, for ``scores.json``; NaN and infinity become ``None``."""
    plain: dict[str, Any] = {"benchmark": result.benchmark, "rules": result.rules, "n": result.n}
    plain["skipped"] = dict(Counter(problem.reason for problem in result.skipped))
    plain["cut"] = result.cut
    if result.limited:
        plain["limited_from"] = result.questions
    if result.failure is not None:
        plain["failure"] = result.failure
    if result.scores is None:
        return plain
    found = asdict(result.scores)
    del found["rows"]
    return _finite(
        plain | found | {"metric": result.metric, "out_of": result.out_of, "judge": len(result.scores.judge)}
    )


def write_summary(folder: Path, results: Sequence[Result], failures: Mapping[str, str] | None = None) -> None:
    """Write ``scores.json`` and ``scores.csv`` of several benchmarks.

    ``scores.json`` also has the leaderboard's average, and why other benchmarks could not be used (``failures``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"benchmarks": [summary(r) for r in results], "average": average(results), "failures": failures or {}}
    (folder / "scores.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _write_csv(folder / "scores.csv", results)


def write_result(out: Path, result: Result, entry: Benchmark, rows: list[dict[str, Any]], name: str) -> None:
    """Write a benchmark's answers and scores into a folder of its own."""
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(out / "predictions.jsonl", result.predictions)
    (out / "scores.json").write_text(json.dumps(summary(result), indent=2, ensure_ascii=False) + "\n", "utf-8")
    _write_csv(out / "scores.csv", [result])
    path = prediction_file(out, name, entry.dataset, default_format())
    questions, answers = [], []
    for row in rows:
        question = dict(row)
        answers.append(question.pop("prediction"))
        questions.append(question)
    write_prediction_file(path, questions, answers)


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["benchmark", "rules", "group", "metric", "score", "out_of", "n", "limited_from", "cut"])
        for result in results:
            if result.scores is None:
                continue
            first = [result.benchmark, result.rules]
            last = [result.n, result.questions if result.limited else "", result.cut]
            writer.writerow([*first, "", result.metric, result.scores.main, result.out_of, *last])
            tables = {"": result.scores.overall} | dict(result.scores.groups)
            for group, row in tables.items():
                writer.writerows([*first, group, key, value, "", *last] for key, value in row.items())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
