"""One rank of an evaluation: ``python -m vlm_distill.evaluate --model M --benchmarks pope --out DIR``.

The launchers start it on several processes as they start training; each answers its share of the questions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from vlm_distill.neighbours import check_neighbours

check_neighbours()  # before anything of `data` is imported

from data.batch import Problem
from data.errors import UserError
from vlm_distill.evaluation.progress import progress_line
from vlm_distill.evaluation.scoring.base import Rules
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.launch import guarded, leave

Number = TypeVar("Number", int, float)


def at_least(smallest: int) -> Callable[[str], int]:
    """Return a type of argparse: a whole number with a bound."""

    def number(text: str) -> int:
        value = _number(int, text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value} is too small: at least {smallest}")
        return value

    return number


def rate(text: str) -> float:
    """Return a number of requests a minute, as a type of argparse."""
    value = _number(float, text)
    if not 0.001 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is too small or too large: at least 0.001")
    return value


def share(text: str) -> float:
    """Return a number from 0 to 1, as a type of argparse."""
    value = _number(float, text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _number(kind: type[Number], text: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number") from None


def mapping(text: str) -> dict[str, Any]:
    """Return a mapping that is written in YAML, as a type of argparse."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping; write it as '{{name: value}}'")
    return value


def mapping_of(flag: str, text: str | None) -> dict[str, Any]:
    """Return the mapping that an option outside argparse gives, or an empty one.

    Raises:
        UserError: the text is no mapping.
    """
    try:
        return {} if text is None else mapping(text)
    except argparse.ArgumentTypeError as mistake:
        raise UserError(f"{flag}: {mistake}") from None


def renaming(text: str) -> dict[str, str]:
    """Return a mapping of names to names, as a type of argparse."""
    value = mapping(text)
    for ours, theirs in value.items():
        if not isinstance(theirs, str):
            raise argparse.ArgumentTypeError(f"{ours}: {theirs!r} is not a name; put it in quotes")
    return value


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as everywhere else."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (--help lists the options)")


def parser() -> argparse.ArgumentParser:
    """Return the parser of this module's options; ``vlm-distill eval`` has the same ones."""
    found = _Parser(prog="vlm_distill.evaluate", description=__doc__, allow_abbrev=False)
    add = found.add_argument
    add("--model", required=True, help="folder or name of a model, or a run's folder")
    add("--benchmarks", action="append", default=[], help="names or YAML files; may be repeated")
    add("--data", action="append", default=[], help="files of questions, or the benchmarks' folder")
    add("--columns", type=renaming, help="keys of the data by our names, as '{image: image_path, question: q}'")
    add("--rules", choices=get_args(Rules), default="vlmevalkit")
    add("--format", choices=["tsv", "huggingface", "official", "source", "text"], help="of the files")
    add("--score", choices=["generate", "likelihood"], default="generate")
    add("--measures", default="exact", help="of data: exact, rouge_l, perplexity, kl; commas between")
    add("--teacher", help="a model that kl is measured from")
    add("--template-arguments", type=mapping, help="of the model's chat template, as '{enable_thinking: false}'")
    add("--teacher-template-arguments", type=mapping, help="of the teacher's")
    add("--max-length", type=at_least(1), default=2048, help="most tokens of a sample, for perplexity and kl")
    add("--judge", help="base address of an OpenAI-compatible endpoint")
    add("--judge-model", default="judge", help="the judge's name there")
    add("--judge-rate", type=rate, help="most requests a minute")
    add("--images", type=Path, help="folder that image paths are relative to")
    add("--root", type=Path, action="append", default=[], help="read no image outside; may be repeated")
    add("--out", type=Path, default=Path("runs/eval"), help="folder for predictions and scores")
    add("--max-bad", type=share, default=0.5, help="most of the questions to leave out, 0 to 1")
    add("--limit", type=at_least(1), help="ask this many questions, evenly spaced")
    add("--batch-size", type=at_least(1), default=64)
    add("--max-new-tokens", type=at_least(1), help="default: the benchmark's own, or 32; more for models that think")
    add("--dtype", choices=["fp32", "bf16"], help="default: as saved; fp32 on a CPU")
    add("--shard", action="store_true", help="each process holds its share of the weights (ZeRO-3)")
    add("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer and score; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: run(parser().parse_args(given)))


def run(options: argparse.Namespace) -> None:
    """Answer everything that the options name, score the answers, write and show the scores."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from vlm_distill.models import load_vlm
    from vlm_distill.models.common import DTYPES
    from vlm_distill.models.teacher import ModelTeacher
    from vlm_distill.models.vocabulary import align_heads
    from vlm_distill.runtime.processes import Processes
    from vlm_distill.training.engine import load_sharded

    # Mistakes are reported before a model is loaded.
    options.model = model_of(options.model)
    _check_together(options)
    opened = _benchmarks(options) if options.benchmarks else _sources(options)
    processes = Processes()
    try:
        # A CPU gains nothing from 16 bits, and some of its layers refuse them.
        dtype = options.dtype or ("fp32" if processes.device.type == "cpu" else None)
        if options.shard:
            whole = DTYPES[dtype or "bf16"]
            # The engine is kept for as long as the model is asked.
            model, _engine = load_sharded(lambda: load_vlm(options.model, dtype=whole), whole, processes)
        else:
            model = load_vlm(options.model, dtype=dtype).to(processes.device)
        model.eval()
        model.processor.set_template_arguments(options.template_arguments or {}, "--template-arguments")
        if options.teacher is not None:
            teacher = load_vlm(options.teacher, dtype=dtype).to(processes.device)
            given = options.teacher_template_arguments or {}
            teacher.processor.set_template_arguments(given, "--teacher-template-arguments")
            align_heads(model, teacher)
            options.teacher = ModelTeacher(teacher)
        settings = {
            "batch_size": options.batch_size,
            "limit": options.limit,
            "rank": processes.rank,
            "world": processes.world,
            "all_gather": processes.gather,
            "resume": {**identity(options.model, model), "roots": [str(root.resolve()) for root in options.root]},
            "tell": partial(print, file=sys.stderr, flush=True),
        }
        failures = (_score_benchmarks if options.benchmarks else _score_sources)(options, opened, model, settings)
    finally:
        processes.close()
    if settings["rank"] == 0:
        report_failures(failures)


def model_of(given: str) -> str:
    """Return the folder of a run's student where a run's folder is given; any other folder or name as it is.

    Raises:
        UserError: the run has no student yet.
    """
    run = Path(given)
    if (run / "student").is_dir():
        return str(run / "student")
    if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
        raise UserError(f"{given}: this run has no student yet; let it finish, or `vlm-distill export {given} FOLDER`")
    return given


def report_failures(failures: Mapping[str, str]) -> None:
    """Print what could not be scored, one line each, and raise the last: the command ends with an error.

    Raises:
        UserError: if there are any.
    """
    mistakes = [UserError(f"{name}: {reason}") for name, reason in failures.items()]
    for mistake in mistakes[:-1]:
        print(f"vlm-distill: {mistake}", file=sys.stderr)
    for mistake in mistakes[-1:]:
        raise mistake


def _check_together(options: argparse.Namespace) -> None:
    """Raise ``UserError`` for an option that would do nothing beside the others."""
    default = parser().get_default
    benchmarks = bool(options.benchmarks)
    for_the_other = ("columns", "measures", "teacher") if benchmarks else ("judge", "rules", "score")
    for name in for_the_other:
        if getattr(options, name) != default(name):
            about = "data, not benchmarks" if benchmarks else "benchmarks (--benchmarks), not data"
            raise UserError(f"--{name}: is about {about}; leave it out")
    if options.teacher_template_arguments and options.teacher is None:
        raise UserError("--teacher-template-arguments: there is no --teacher; leave it out")


def _sources(options: argparse.Namespace) -> list[Any]:
    from data.opening import open_source, open_text
    from data.plain_text import CHARACTERS_PER_TOKEN
    from vlm_distill.config.fields import Measure
    from vlm_distill.evaluation.held_out import OF_ANSWERS

    measures = options.measures.split(",")
    unknown = [name for name in measures if name not in get_args(Measure)]
    if unknown:
        raise UserError(f"--measures: no {unknown[0]!r}; there are {', '.join(get_args(Measure))}")
    if ("kl" in measures) != (options.teacher is not None):
        raise UserError("--measures: kl is measured from a --teacher; name both or neither")
    if options.format == "text" and OF_ANSWERS & set(measures):
        raise UserError("--format text: plain text gets no answers; name --measures perplexity, or kl")
    if not options.data:
        raise UserError("nothing to ask: name benchmarks (--benchmarks) or files of questions (--data)")
    if options.format == "text":
        if options.columns:
            raise UserError("--columns: plain text has none; leave it out")
        return [open_text(path, CHARACTERS_PER_TOKEN * options.max_length) for path in options.data]
    sources: list[Any] = [open_source(path, images=options.images, columns=options.columns) for path in options.data]
    if len({source.name for source in sources}) < len(sources):
        raise UserError("--data: two files have one name, so that their scores would overwrite each other; rename one")
    return sources


def _score_sources(
    options: argparse.Namespace, sources: Sequence[Any], model: Any, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Score data sources, and return why others could not be."""
    from rich.table import Table

    from data.collate import Collator
    from data.images import load_image
    from vlm_distill.evaluation.held_out import OF_ANSWERS, add_to_scores, measure, measured_in_words
    from vlm_distill.evaluation.rouge import mean_rouge_l
    from vlm_distill.evaluation.runner import SOURCE_LENGTH, evaluate, limit_mark, summarise

    failures: dict[str, str] = {}
    measures, teacher = options.measures.split(","), options.teacher
    load = partial(load_image, roots=options.root)
    collator = Collator(model.processor, teacher and teacher.processor, options.max_length)
    for source in sources:
        skipped: list[Problem] = []
        values: dict[str, Any] = {}
        scores: dict[str, Any] = {"n": 0, "by_type": {}}
        if OF_ANSWERS & set(measures):
            predictions = evaluate(
                model,
                source,
                max_new_tokens=options.max_new_tokens or SOURCE_LENGTH,
                out=options.out / source.name,
                about={"source": source.name, "name": options.model},
                load=load,
                skipped=skipped,
                progress=progress_line(f"{source.name}, answers") if settings["rank"] == 0 else None,
                **settings,
            )
            scores = summarise(predictions, skipped, len(source))
            values |= {key: scores[key] for key in ("n", "cut", "limited_from") if key in scores}
            if "exact" in measures:
                values |= {"exact": scores["exact"], "soft": scores["soft"]}
            if "rouge_l" in measures and predictions:
                values["rouge_l"] = mean_rouge_l(predictions)
        if not set(measures) <= OF_ANSWERS:
            ranks = {key: settings[key] for key in ("limit", "rank", "world", "all_gather")}
            found = measure(model, teacher, source, collator, load=load, skipped=skipped, **ranks)
            values |= {"n": found.n, **found.values(measures), **limit_mark(source, options.limit)}
        for mistake in too_much_left_out(source.name, values["n"], skipped, options.max_bad):
            failures[source.name] = mistake.removeprefix(f"{source.name}: ")
        if settings["rank"]:
            continue
        if measures != ["exact"]:
            add_to_scores(options.out / source.name, measures, values)
        print(f"{source.name}: {measured_in_words(values)}")
        if "exact" in measures and scores["by_type"]:
            table = Table("questions", "n", "exact match", "VQA accuracy")
            for name, row in scores["by_type"].items():
                table.add_row(name, str(row["n"]), f"{row['exact']:.2%}", f"{row['soft']:.2%}")
            plain_console().print(table)
        _tell_skipped(skipped)
        print(options.out / source.name)
    return failures


def _benchmarks(options: argparse.Namespace) -> Any:
    """Return the opened benchmarks (``benchmark_run.OpenBenchmarks``); what is wrong with their files is printed."""
    from vlm_distill.evaluation.benchmark_run import open_benchmarks

    if len(options.data) > 1:
        raise UserError("--data: with --benchmarks it is the one folder that their files are in")
    opened = open_benchmarks(
        [name for given in options.benchmarks for name in given.split(",")],
        options.data[0] if options.data else None,
        options.rules,
        format=options.format,
        images=options.images,
        limit=options.limit,
        likelihood=options.score == "likelihood",
    )
    if not opened.ready:
        report_failures(opened.failures)
    if os.environ.get("RANK", "0") == "0":
        for text in opened.warnings:
            print(f"warning: {text}", file=sys.stderr)
        for name, reason in opened.failures.items():
            print(f"warning: {name} is left out: {reason}", file=sys.stderr)
    return opened


def _score_benchmarks(
    options: argparse.Namespace, opened: Any, model: Any, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Ask and score benchmarks, and return why others could not be."""
    from data.images import load_image
    from vlm_distill.evaluation.benchmark_run import run_benchmark, write_summary
    from vlm_distill.evaluation.benchmarks import data_folder, entry_name, get
    from vlm_distill.reporting.score_tables import print_results

    judge = open_judge(options.judge, options.judge_model, options.judge_rate, options.out)
    given = {get(name).name: entry_name(name) for listed in options.benchmarks for name in listed.split(",")}
    # By which `vlm-distill score` finds the right answers again.
    where = {
        "data": str(data_folder(options.data[0] if options.data else None).resolve()),
        "format": options.format,
        "images": None if options.images is None else str(options.images.resolve()),
    }
    results = []
    for entry, questions in opened.ready:
        result = run_benchmark(
            model,
            entry,
            questions,
            options.out / entry.name,
            rules=options.rules,
            name=options.model,
            judge=judge,
            likelihood=options.score == "likelihood",
            max_new_tokens=options.max_new_tokens,
            about={"entry": given[entry.name], **where},
            # As VLMEvalKit and lmms-eval decode images.
            load=partial(load_image, roots=options.root, alpha="drop"),
            progress=progress_line(f"{entry.name}, answers") if settings["rank"] == 0 else None,
            **settings,
        )
        if result is not None:
            results.append(result)
            _tell_skipped(result.skipped)
    failures = opened.failures | {result.benchmark: result.failure for result in results if result.failure is not None}
    for result in results:
        for mistake in too_much_left_out(result.benchmark, result.n, result.skipped, options.max_bad):
            failures[result.benchmark] = mistake.removeprefix(f"{result.benchmark}: ")
    if results:
        write_summary(options.out, results, failures)
        print_results(results)
        print(options.out / "scores.csv")
    return failures


def open_judge(url: str | None, model: str, requests_per_minute: float | None, out: Path) -> Any:
    """Return the judge (``judge.Judge``) at an address, whose replies are kept in ``out``; ``None`` without one."""
    from vlm_distill.evaluation.judge import Judge

    if url is None:
        return None
    show = progress_line("judge, replies")
    return Judge(url, model, out / "judge.jsonl", requests_per_minute=requests_per_minute, progress=show)


def too_much_left_out(
    name: str, answered: int, skipped: Sequence[Problem], limit: float, what: str = "questions"
) -> list[str]:
    """Return why scores cannot stand: nothing was asked, or more was left out than ``--max-bad`` allows.

    Args:
        name: of the data or benchmark.
        answered: how many questions have an answer.
        skipped: those that were left out, perhaps twice, where several things were measured.
        limit: the share that may be left out.
        what: what is asked about.
    """
    from vlm_distill.training.intake import commonest, reasons

    left_out = len({(problem.source, problem.line) for problem in skipped})
    whole = answered + left_out
    if answered and left_out <= limit * whole:
        return []
    if not left_out:
        return [f"{name}: there are no {what}"]
    said = f"no {what} could be used" if not answered else f"more than --max-bad {limit:g} allows"
    remedies = {"image not found": "name their folder by --images", "image outside the roots": "allow it by --root"}
    remedy = remedies.get(commonest(skipped), "mend the data")
    return [f"{name}: {left_out:,} of {whole:,} {what} left out, {said}: {reasons(skipped)}; {remedy}"]


def _tell_skipped(skipped: Sequence[Problem]) -> None:
    if skipped:
        one = skipped[0]
        print(f"{len(skipped)} left out, the first: {one.source}, line {one.line}: {one.reason}")


def identity(name: str, model: Any = None) -> dict[str, Any]:
    """Return what tells a model's answers from another's: its files, its precision, its chat template."""
    from vlm_distill.evaluation.kept import digest_of
    from vlm_distill.models.fingerprint import fingerprint

    found: dict[str, Any] = {"files": fingerprint(name) or name}
    if model is not None:
        found["dtype"] = str(model.dtype).removeprefix("torch.")
        # With the template's arguments, which are written into it.
        found["chat_template"] = digest_of(model.processor.chat_template)
    return found


if __name__ == "__main__":
    leave(main())
