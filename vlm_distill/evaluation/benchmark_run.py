"""A benchmark from questions to scores: answered by a model, scored by rules and perhaps a judge, written down."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from data.batch import Problem
from data.conversation import ImageSource
from data.errors import UserError
from data.images import load_image
from vlm_distill.models.interface import Answer, Prompt

from . import benchmarks
from .benchmark import Benchmark, Format, Rules
from .judge import UNREADABLE, Judge, ask_judge
from .pictures import write_pictures
from .prediction_files import default_format, prediction_file, read_back
from .prediction_files import write_predictions as write_table
from .prompts import options
from .questions import BenchmarkQuestions
from .runner import AllGather, Answerer, Prediction, evaluate, write_lines
from .scoring.base import Scores
from .scoring.registry import rules_of, score
from .scoring.suite import suite_average

#: Scorers of answers that are yes or no.
_YES_OR_NO = ("pope", "mme", "hallusionbench")


class CannotScore(UserError):
    """Answers that the rules cannot score. It is raised when all ranks have done their part."""


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
        scores: ``None`` where the right answers are not published.
        skipped: questions that could not be asked.
        out_of: the main score of a model that is always right.
    """

    benchmark: str
    metric: str
    rules: str
    predictions: list[Prediction]
    scores: Scores | None
    skipped: list[Problem]
    out_of: float = 100.0


def open_benchmarks(
    names: Sequence[str],
    data: str | Path | None,
    rules: Rules,
    *,
    format: Format | None = None,
    images: Path | None = None,
) -> tuple[list[tuple[Benchmark, BenchmarkQuestions]], list[str]]:
    """Entries with their open questions, and what is to be told about the files.

    Args:
        names, data, rules, format, images: as in ``benchmarks.find``.

    Raises:
        UserError: as there, or a benchmark has no such rules.
    """
    opened = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        for name in names:
            entry = benchmarks.get(name)
            check_rules(entry, rules)
            opened.append((entry, benchmarks.find(entry, data, rules=rules, format=format, images=images)))
    return opened, [str(warning.message) for warning in told]


def check_rules(entry: Benchmark, rules: str) -> None:
    """Raises ``UserError`` where a benchmark cannot be scored by these rules."""
    known = rules_of(entry.scorer)
    if rules not in known:
        raise UserError(f"{entry.name} has no rules {rules!r}; it has {', '.join(known)}")


def by_likelihood(model: Chooser, entry: Benchmark) -> Callable[[Sequence[Prompt]], list[Answer]]:
    """Answers that are the likeliest option's letter, or the likelier of Yes and No, without generation.

    Raises:
        UserError: when asked a question without options.
    """

    def choose(prompts: Sequence[Prompt]) -> list[Answer]:
        given = [list(options(conversation.metadata)) for conversation, _ in prompts]
        if entry.scorer in _YES_OR_NO:
            given = [["Yes", "No"]] * len(prompts)
        if not all(given):
            raise UserError(f"{entry.name}: a question has no options to choose from by likelihood; leave --score out")
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
    resume: str | None = None,
    load: Callable[[ImageSource], Image.Image] = load_image,
    pictures: Path | None = None,
) -> Result | None:
    """Answers a benchmark's questions, scores them and writes ``out``.

    Args:
        model: answers, as in ``runner.evaluate``; where ``likelihood``, also a :class:`Chooser`.
        entry, questions: from ``benchmarks.find``.
        out: receives ``predictions.jsonl``, ``scores.json``, ``scores.csv`` and VLMEvalKit's prediction file; nothing
            is written without it.
        name: the model's, for that file.
        judge: decides what the rules leave to one.
        max_new_tokens: in place of the benchmark's own.
        pictures: folder for small copies of pictures that are no files (:func:`~.pictures.write_pictures`).
        resume, load, and others: as in ``runner.evaluate``.

    Returns:
        On rank 0 the result; ``None`` on others.

    Raises:
        CannotScore: on rank 0 alone; the answers stay in ``out/unfinished`` where ``resume``.
    """
    check_rules(entry, rules)
    results: list[Result] = []

    def finish(predictions: list[Prediction], skipped: list[Problem]) -> None:
        rows = answered(questions, predictions)
        try:
            scores = judged(entry, rows, rules, judge) if any(map(published, rows)) else None
        except UserError as error:
            raise CannotScore(f"{entry.name}: {error}") from None
        if scores is not None:
            predictions = [replace(p, score=s) for p, s in zip(predictions, scores.rows, strict=True)]
        results.append(Result(entry.name, entry.metric, rules, predictions, scores, skipped, entry.out_of))
        if out is not None:
            _write(out, results[0], entry, rows, name)
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
        resume=None if resume is None else f"{resume} {rules} {'likelihood' if likelihood else 'generate'}",
        load=load,
        ask=by_likelihood(model, entry) if likelihood else None,  # type: ignore[arg-type]
        references=False,
        finish=finish,
    )
    return results[0] if results else None


def answered(questions: BenchmarkQuestions, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Rows as scorers take them, with the answers to them."""
    return [questions.row(p.index) | {"prediction": p.answer} for p in predictions]


def published(row: dict[str, Any]) -> bool:
    """Whether a row's right answer is known."""
    return row.get("answer") is not None or row.get("answers") is not None


def judged(entry: Benchmark, rows: list[dict[str, Any]], rules: str, judge: Judge | None) -> Scores:
    """Return the scores of answered rows; a judge fills the column ``judge`` of those that the rules leave to it.

    VLMEvalKit scores what it reads back from its prediction file, where "7" may have become 7.0 and "N/A" empty: so do
    its rules here.
    """
    if rules == "vlmevalkit":
        rows = read_back(rows)
    scores = score(entry.scorer, rows, rules, **entry.scorer_options)
    if judge is not None and scores.judge:
        unreadable = ask_judge(judge, entry.scorer, rules, [rows[i] for i in scores.judge])
        scores = score(entry.scorer, rows, rules, **entry.scorer_options)
        scores = replace(scores, fallbacks={**scores.fallbacks, UNREADABLE: unreadable})
    return scores


def average(results: Sequence[Result]) -> float | None:
    """The Open VLM Leaderboard's average, if all of its eight benchmarks are there."""
    names = benchmarks.LEADERBOARD
    return suite_average({names[r.benchmark]: r.scores.main for r in results if r.benchmark in names and r.scores})


def summary(result: Result) -> dict[str, Any]:
    """A result without its answers, as ``scores.json`` has it; numbers that are none are ``None``."""
    plain: dict[str, Any] = {"benchmark": result.benchmark, "rules": result.rules, "n": len(result.predictions)}
    reasons = [problem.reason for problem in result.skipped]
    plain["skipped"] = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    if result.scores is None:
        return plain
    found = asdict(result.scores)
    del found["rows"]
    return _finite(
        plain | found | {"metric": result.metric, "out_of": result.out_of, "judge": len(result.scores.judge)}
    )


def write_summary(folder: Path, results: Sequence[Result]) -> None:
    """Writes ``scores.json`` and ``scores.csv`` of several benchmarks, and the leaderboard's average if it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"benchmarks": [summary(r) for r in results], "average": average(results)}
    (folder / "scores.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _write_csv(folder / "scores.csv", results)


def _write(out: Path, result: Result, entry: Benchmark, rows: list[dict[str, Any]], name: str) -> None:
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
        writer.writerow(["benchmark", "rules", "group", "metric", "score"])
        for result in results:
            if result.scores is None:
                continue
            first = [result.benchmark, result.rules]
            writer.writerow([*first, "", result.metric, result.scores.main])
            tables = {"": result.scores.overall} | dict(result.scores.groups)
            writer.writerows([*first, group, key, value] for group, row in tables.items() for key, value in row.items())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
