"""A benchmark from questions to scores: answered by a model, scored by rules and perhaps a judge, written down."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from data.batch import Problem
from data.conversation import ImageSource
from data.errors import BadSample, UserError
from data.images import load_image
from vlm_distill.models.answers import Answer
from vlm_distill.models.processor import Prompt

from . import benchmarks
from .benchmark import Benchmark, Format, Rules
from .judge import UNREADABLE, Judge, ask_judge
from .pictures import write_pictures
from .prediction_files import default_format, prediction_file, read_back
from .prediction_files import write_predictions as write_table
from .prompts import options
from .questions import BenchmarkQuestions
from .runner import AllGather, Answerer, Prediction, commonest, evaluate, share, write_lines
from .scoring.base import Scores
from .scoring.registry import rules_of, score
from .scoring.suite import suite_average

#: Scorers of answers that are yes or no.
_YES_OR_NO = ("pope", "mme", "hallusionbench")
# An answer that all rules take, whatever the question.
_STAND_IN = "unanswered"


class Chooser(Protocol):
    """What scoring by likelihood needs of a model (``VisionLanguageModel`` is one)."""

    def score_options(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]: ...


@dataclass(frozen=True)
class Result:
    """One benchmark's answers and scores.

    Attributes:
        benchmark: its name.
        metric: what people call the main score.
        rules: whose.
        predictions: with their scores.
        scores: ``None`` where there are none: the right answers are not published, or ``failure`` says why.
        skipped: questions that could not be asked, and answers that could not be scored without others of their group.
        out_of: the main score of a model that is always right on these questions.
        questions: in the benchmark's files.
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
        """How many answers the scores are of."""
        return len(self.predictions) if self.scores is None else len(self.scores.rows)

    @property
    def cut(self) -> int:
        """How many answers were cut before their end."""
        return sum(not p.complete for p in self.predictions)

    @property
    def whole(self) -> bool:
        """Whether the scores are of all of the benchmark's questions."""
        return self.scores is not None and not self.limited and not self.skipped

    def notes(self) -> list[str]:
        """Return what to know about the scores, in a few words each; cut answers are counted by themselves."""
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
                notes.append(f"{len(self.scores.judge):,} answers need a judge (--judge)")
        return notes


@dataclass(frozen=True)
class OpenBenchmarks:
    """Benchmarks whose files were opened and checked.

    Attributes:
        ready: entries with their open questions.
        warnings: what to know about their files.
        failures: name and reason, in one line, of each benchmark whose files cannot be used.
    """

    ready: list[tuple[Benchmark, BenchmarkQuestions]]
    warnings: list[str]
    failures: dict[str, str]


def open_benchmarks(
    names: Sequence[str],
    data: str | Path | None,
    rules: Rules,
    *,
    format: Format | None = None,
    images: Path | None = None,
    limit: int | None = None,
    likelihood: bool = False,
) -> OpenBenchmarks:
    """Return the benchmarks with their open questions, and those whose files cannot be used.

    Args:
        names, data, rules, format, images: as in ``benchmarks.find``.
        limit, likelihood: as in :func:`run_benchmark`.

    Raises:
        UserError: there is no such benchmark, or it has no such rules: mistakes of the command, not of a file.
    """
    entries = {entry.name: entry for entry in map(benchmarks.get, names)}
    for entry in entries.values():
        check_rules(entry, rules)
    opened = OpenBenchmarks([], [], {})
    with collected_warnings(opened.warnings):
        for name, entry in entries.items():
            try:
                questions = benchmarks.find(entry, data, rules=rules, format=format, images=images)
                check_questions(entry, questions, rules, limit=limit, likelihood=likelihood)
            except UserError as error:
                opened.failures[name] = str(error).removeprefix(f"{name}: ")
            else:
                opened.ready.append((entry, questions))
    return opened


@contextmanager
def collected_warnings(told: list[str]) -> Iterator[None]:
    """Add the texts of the warnings that are raised inside to a list, instead of showing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    told.extend(str(warning.message) for warning in caught)


def check_questions(
    entry: Benchmark, questions: BenchmarkQuestions, rules: str, *, limit: int | None, likelihood: bool
) -> None:
    """Raise ``UserError`` where the files alone show that no answers to them could be scored.

    The rows are scored with stand-in answers: hours of answering should not end in a refusal known before.
    """
    asked = share(questions, limit)
    rows = _readable(questions, asked)
    if likelihood and entry.scorer not in _YES_OR_NO and not all(map(options, rows.values())):
        raise UserError(f"{entry.name}: a question has no options to choose from by likelihood; leave --score out")
    broken = questions.incomplete(asked)
    complete = [row | {"prediction": _STAND_IN} for index, row in rows.items() if index not in broken]
    if any(map(published, complete)):
        judged(entry, complete, rules, None, partial=len(asked) < len(questions) or bool(broken))


def check_rules(entry: Benchmark, rules: str) -> None:
    """Raises ``UserError`` where a benchmark cannot be scored by these rules."""
    known = rules_of(entry.scorer)
    if rules not in known:
        raise UserError(f"{entry.name} has no rules {rules!r}; it has {', '.join(known)}")


def by_likelihood(model: Chooser, entry: Benchmark) -> Callable[[Sequence[Prompt]], list[Answer]]:
    """Return a function that answers with the likeliest option's letter, or the likelier of Yes and No.

    Nothing is generated. Every question has options (:func:`check_questions`).
    """

    def choose(prompts: Sequence[Prompt]) -> list[Answer]:
        given = [list(options(conversation.metadata)) for conversation, _ in prompts]
        if entry.scorer in _YES_OR_NO:
            given = [["Yes", "No"]] * len(prompts)
        answers = []
        for texts, likelihoods in zip(given, model.score_options(prompts, given), strict=True):
            best = max(range(len(texts)), key=lambda k: likelihoods[k])
            answers.append(Answer(texts[best], [], [likelihoods[best]]))
        return answers

    return choose


def run_benchmark(
    model: Answerer,
    entry: Benchmark,
    questions: BenchmarkQuestions,
    out: Path | None,
    *,
    rules: Rules = "vlmevalkit",
    name: str = "model",
    judge: Judge | None = None,
    likelihood: bool = False,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    all_gather: AllGather | None = None,
    resume: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    load: Callable[[ImageSource], Image.Image] = load_image,
    pictures: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Result | None:
    """Answer a benchmark's questions, score the answers and write ``out``.

    Args:
        model: answers, as in ``runner.evaluate``; where ``likelihood``, also a :class:`Chooser`.
        entry, questions: from :func:`open_benchmarks`.
        out: receives ``predictions.jsonl``, ``asked.json``, ``scores.json``, ``scores.csv`` and VLMEvalKit's prediction
            file; nothing is written without it.
        name: the model's, for that file.
        judge: decides what the rules leave to one.
        max_new_tokens: in place of the benchmark's own.
        about: further facts for ``asked.json``, by which the answers can be scored again.
        pictures: folder for small copies of pictures that are no files (:func:`~.pictures.write_pictures`).
        resume, load, and others: as in ``runner.evaluate``.

    Returns:
        On rank 0 the result, whose ``failure`` says why there are no scores; ``None`` on other ranks.
    """
    check_rules(entry, rules)
    results: list[Result] = []

    def finish(predictions: list[Prediction], skipped: list[Problem]) -> None:
        result, rows = score_answers(entry, questions, predictions, rules, judge, skipped)
        results.append(result)
        if out is not None:
            write_result(out, result, entry, rows, name)
        if pictures is not None:
            write_pictures(pictures, predictions, lambda row: questions[row].prompt().images[0], load)

    evaluate(
        model,
        questions,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens or entry.length_for(rules),
        limit=limit,
        rank=rank,
        world=world,
        all_gather=all_gather,
        out=out,
        resume=None if resume is None else {**resume, "answers": "likelihood" if likelihood else "generate"},
        about={**(about or {}), "benchmark": entry.name, "rules": rules, "name": name},
        load=load,
        progress=progress,
        tell=tell,
        ask=by_likelihood(model, entry) if likelihood else None,  # type: ignore[arg-type]
        references=False,
        finish=finish,
    )
    return results[0] if results else None


def score_answers(
    entry: Benchmark,
    questions: BenchmarkQuestions,
    predictions: Sequence[Prediction],
    rules: Rules,
    judge: Judge | None = None,
    skipped: Sequence[Problem] = (),
) -> tuple[Result, list[dict[str, Any]]]:
    """Score answers to a benchmark, and return the result with the answered rows as scorers take them.

    A pair or group of questions that are scored together is left out and counted where one of them has no answer.
    What cannot be scored at all has a result with ``failure``: no answer is lost.
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
        failure = f"no question could be asked: {commonest(skipped)}"
    elif not kept:
        failure = f"no group of questions that are scored together is complete: {commonest(skipped)}"
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
    """Return the main score of a model that is always right on the questions that were scored."""
    if "question" in entry.worth:
        return entry.worth["question"] * sum(found is not None for found in scores.rows)
    if "group" in entry.worth:
        return entry.worth["group"] * len(scores.groups)
    return entry.out_of


def answered(questions: BenchmarkQuestions, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return rows as scorers take them, with the answers to them."""
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
    """Return the scores of answered rows; a judge fills the column ``judge`` of those that the rules leave to it.

    VLMEvalKit scores what it reads back from its prediction file, where "7" may have become 7.0 and "N/A" empty: so do
    its rules here. ``partial``: these are not all of the benchmark's rows.
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


def average(results: Sequence[Result]) -> float | None:
    """Return the Open VLM Leaderboard's average.

    ``None`` unless all of its eight benchmarks are there, each whole and by VLMEvalKit's rules, as it is defined.
    """
    names = benchmarks.LEADERBOARD
    usable = [r for r in results if r.benchmark in names and r.rules == "vlmevalkit" and r.whole]
    return suite_average({names[r.benchmark]: r.scores.main for r in usable if r.scores is not None})


def summary(result: Result) -> dict[str, Any]:
    """Return a result without its answers, as ``scores.json`` has it; NaN and infinity become ``None``."""
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

    ``scores.json`` has the leaderboard's average too, and why other benchmarks could not be used (``failures``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"benchmarks": [summary(r) for r in results], "average": average(results), "failures": failures or {}}
    (folder / "scores.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _write_csv(folder / "scores.csv", results)


def write_result(out: Path, result: Result, entry: Benchmark, rows: list[dict[str, Any]], name: str) -> None:
    """Write a benchmark's answers and scores into a folder of its own."""
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "predictions.jsonl", result.predictions)
    (out / "scores.json").write_text(json.dumps(summary(result), indent=2, ensure_ascii=False) + "\n", "utf-8")
    _write_csv(out / "scores.csv", [result])
    path = prediction_file(out, name, entry.dataset, default_format())
    answers = [row["prediction"] for row in rows]
    write_table(path, [{k: v for k, v in row.items() if k != "prediction"} for row in rows], answers)


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
