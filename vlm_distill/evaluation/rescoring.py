"""Score kept answers again, by other rules or with a judge, without the model that gave them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from data.batch import Problem
from data.conversation import Conversation
from data.errors import UserError

from .answering import recalled
from .benchmark_entry import Benchmark
from .benchmark_lookup import find_questions, get_benchmark
from .benchmark_questions import BenchmarkQuestions
from .benchmark_run import collected_warnings
from .benchmark_scores import Result, check_questions, check_rules, score_answers, write_result, write_summary
from .judge import Judge
from .kept_answers import PREDICTIONS, kept_answer, read_asked, teacher_name, unusable_rows, write_asked
from .predictions import Prediction, read_predictions, score_kept
from .question_source import read_question
from .scoring.scores import Rules

#: Key in the ``asked.json`` of scores made from kept answers: the folder of these answers.
_FROM = "answers"


def score_again(
    answers: Path,
    rules: Rules | None,
    out: Path,
    *,
    judge: Judge | None = None,
    data: Path | None = None,
) -> tuple[list[Result], dict[str, str], list[str]]:
    """Score the answers that an evaluation kept, and write scores as the evaluation did.

    Answers to questions that have changed since are left out and counted. The answers' own folder is not touched.

    Args:
        answers: an evaluation's folder, a run's, a benchmark's in either, or a ``predictions.jsonl``.
        rules: by default those by which the questions were asked.
        out: folder for the scores; gets a subfolder for each benchmark.
        judge: decides what the rules leave to one.
        data: the benchmarks' folder, if it has moved.

    Returns:
        A result for each benchmark, name and reason for those that cannot be scored, and warnings about the files.

    Raises:
        UserError: there are no answers to benchmarks, or ``out`` holds other answers.
    """
    results, failures, told = [], dict[str, str](), list[str]()
    for folder in _folders(answers):
        about = {**_told_by_scores(folder), **read_asked(folder)}
        if not {"benchmark", "rules"} <= about.keys():
            continue
        name = str(about["benchmark"])
        place = out / _place(folder, name)
        _check_place(place, folder)
        try:
            with collected_warnings(told):
                result = _score_one(folder, about, rules, place, judge, data)
        except UserError as error:
            failures[name] = str(error).removeprefix(name).lstrip(": ")
            continue
        results.append(result)
        if result.failure is not None:
            failures[name] = result.failure
    if not results and not failures:
        raise UserError(f"{answers}: no answers to benchmarks there, and other answers have no rules to be scored by")
    if results:
        write_summary(out, results, failures)
    return results, failures, told


def known_rules(given: str | None) -> Rules | None:
    """Return the rules of this name.

    Raises:
        UserError: there are no such rules.
    """
    found = next((name for name in get_args(Rules) if name == given), None)
    if given is not None and found is None:
        raise UserError(f"--rules: no {given!r}; there are {', '.join(get_args(Rules))}")
    return found


def default_out(answers: Path, rules: str | None, judge: str | None) -> Path:
    """Return a new folder beside the evaluation or run, named after the rules and the judge."""
    folder = (answers.parent if answers.is_file() else answers).resolve()
    names = [rules or "again", *([] if judge is None else ["by", Path(judge).name])]
    # For a single benchmark's answers, leave the evaluation's folder: scores in it would be taken for its own.
    inside = 0
    if (folder / PREDICTIONS).exists():
        inside = 3 if _of_run(folder) else 1
    for _ in range(inside):
        if folder.name != "evaluation":
            names.insert(0, folder.name)
        folder = folder.parent
    return folder.with_name("_".join([folder.name, *names]))


def _folders(answers: Path) -> list[Path]:
    if answers.is_file():
        return [answers.parent]
    found = sorted(path.parent for path in answers.rglob(PREDICTIONS))
    if not found:
        raise UserError(f"{answers}: no {PREDICTIONS} there; evaluate first, or name another folder")
    return found


def _told_by_scores(folder: Path) -> dict[str, Any]:
    """Return benchmark and rules from ``scores.json``, for answers older than ``asked.json``."""
    try:
        found = json.loads((folder / "scores.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: found[key] for key in ("benchmark", "rules") if isinstance(found, dict) and key in found}


def _place(folder: Path, name: str) -> Path:
    # A run's folder holds the student's and its teachers' answers for each benchmark.
    return Path(name) / folder.name if _of_run(folder) else Path(name)


def _of_run(folder: Path) -> bool:
    """Return whether a run wrote these answers, by the folder's name."""
    return folder.name == "student" or teacher_name(folder.name) is not None


def _check_place(place: Path, folder: Path) -> None:
    """Raise ``UserError`` if scores would replace answers."""
    there = read_asked(place)
    if place.resolve() == folder.resolve() or ((place / PREDICTIONS).exists() and there.get(_FROM) != _named(folder)):
        raise UserError(f"{place}: holds answers that these scores would replace; name another --out")


def _named(folder: Path) -> str:
    return str(folder.resolve())


def _score_one(
    folder: Path, about: dict[str, Any], rules: Rules | None, out: Path, judge: Judge | None, data: Path | None
) -> Result:
    entry = get_benchmark(str(about.get("entry", about["benchmark"])))
    wanted: Rules = rules or about["rules"]
    check_rules(entry, wanted)
    asked = _open(entry, about, data)
    questions = entry.questions(asked.table, asked.layout, wanted)
    check_questions(entry, questions, wanted, limit=None, likelihood=False)
    kept = read_predictions(folder / PREDICTIONS)
    if not kept:
        raise UserError(f"{folder / PREDICTIONS}: has no answers; evaluate again")
    predictions, changed = _current(kept, asked)
    unusable = [row for row in unusable_rows(about) if row < len(asked)]
    skipped = [*changed, *(Problem(asked.name, asked.line(row), "could not be asked") for row in unusable)]
    result, rows = score_answers(entry, questions, predictions, wanted, judge, skipped)
    write_result(out, result, entry, rows, str(about.get("name", "model")))
    write_asked(out, {**about, "scored_by": wanted, _FROM: _named(folder)})
    return result


def _open(entry: Benchmark, about: dict[str, Any], data: Path | None) -> BenchmarkQuestions:
    """Return the questions as they were asked."""
    images = about.get("images")
    return find_questions(
        entry,
        data or about.get("data"),
        rules=about["rules"],
        format=about.get("format"),
        images=Path(images) if images else None,
    )


def _current(predictions: list[Prediction], asked: BenchmarkQuestions) -> tuple[list[Prediction], list[Problem]]:
    """Return the answers to questions that are still asked, at their current rows, and problems for the others."""
    kept = [kept_answer(asdict(p)) for p in predictions]
    by = {(p.index, p.asked): p.by for p in predictions}
    # Old answers without digests are matched by their questions' texts.
    places = recalled(kept, asked, range(len(asked)), references=False)
    places |= {p.index: k for p, k in zip(predictions, kept, strict=True) if not p.asked and _same_text(asked, p)}
    found = []
    for row, answer in sorted(places.items()):
        scored = score_kept(row, asked[row], answer)
        found.append(replace(scored, by=by[answer.index, answer.asked]))
    used = {(answer.index, answer.asked) for answer in places.values()}
    lost = [p for p in predictions if (p.index, p.asked) not in used]
    return found, [Problem(asked.name, p.line, "the question has changed since it was asked") for p in lost]


def _same_text(asked: BenchmarkQuestions, prediction: Prediction) -> bool:
    now = read_question(asked, prediction.index, False) if prediction.index < len(asked) else None
    return isinstance(now, Conversation) and now.question == prediction.question
