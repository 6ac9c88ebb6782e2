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
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from vlm_distill.neighbours import check_neighbours

check_neighbours()  # before anything of `data` is imported

from data.batch import Problem
from data.errors import UserError
from vlm_distill.evaluation.answering import Asking, Feedback
from vlm_distill.evaluation.kept_answers import AnswerFolder
from vlm_distill.evaluation.left_out import too_much_left_out
from vlm_distill.evaluation.model_identity import identity, student_of
from vlm_distill.evaluation.progress import progress_line
from vlm_distill.evaluation.rank_share import RankShare
from vlm_distill.evaluation.scoring.scores import Rules
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.launch import guarded, leave

if TYPE_CHECKING:
    from vlm_distill.evaluation.benchmark_run import OpenBenchmarks
    from vlm_distill.evaluation.judge import Judge
    from vlm_distill.evaluation.source_run import SourceResult
    from vlm_distill.models.interface import VisionLanguageModel
    from vlm_distill.models.teacher import ModelTeacher
    from vlm_distill.training.engine import Processes

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
    """Ask everything that the options name, score the answers, write and print the scores."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from vlm_distill.training.engine import Processes

    # Report mistakes before a model is loaded.
    options.model = student_of(options.model)
    _check_together(options)
    benchmarks = _open_benchmarks(options) if options.benchmarks else None
    sources = [] if options.benchmarks else _open_sources(options)

    processes = Processes()
    try:
        model, _engine = _load_model(options, processes)  # the engine must live as long as the model is asked
        ranks = RankShare(processes.rank, processes.world, processes.gather)
        if benchmarks is not None:
            failures = _run_benchmarks(options, benchmarks, model, ranks)
        else:
            teacher = _load_teacher(options, model, processes)
            failures = _run_sources(options, sources, model, teacher, ranks)
    finally:
        processes.close()
    if ranks.first:
        report_failures(failures)


def _load_model(options: argparse.Namespace, processes: Processes) -> tuple[VisionLanguageModel, Any]:
    """Return the model in evaluation mode, and the engine that holds its shards, if any."""
    from vlm_distill.models import load_vlm
    from vlm_distill.models.common import DTYPES
    from vlm_distill.training.engine import load_sharded

    engine: Any = None
    if options.shard:
        dtype = DTYPES[_dtype(options, processes) or "bf16"]
        model, engine = load_sharded(lambda: load_vlm(options.model, dtype=dtype), dtype, processes)
    else:
        model = load_vlm(options.model, dtype=_dtype(options, processes)).to(processes.device)
    model.eval()
    model.processor.set_template_arguments(options.template_arguments or {}, "--template-arguments")
    return model, engine


def _load_teacher(options: argparse.Namespace, model: VisionLanguageModel, processes: Processes) -> ModelTeacher | None:
    """Return the model that kl is measured from, if any."""
    from vlm_distill.models import load_vlm
    from vlm_distill.models.teacher import ModelTeacher
    from vlm_distill.models.vocabulary import align_heads

    if options.teacher is None:
        return None
    teacher = load_vlm(options.teacher, dtype=_dtype(options, processes)).to(processes.device)
    arguments = options.teacher_template_arguments or {}
    teacher.processor.set_template_arguments(arguments, "--teacher-template-arguments")
    align_heads(model, teacher)
    return ModelTeacher(teacher)


def _dtype(options: argparse.Namespace, processes: Processes) -> str | None:
    # A CPU gains nothing from 16 bits, and some of its layers refuse them.
    return options.dtype or ("fp32" if processes.device.type == "cpu" else None)


def report_failures(failures: Mapping[str, str]) -> None:
    """Print what could not be scored, one line each; raise the last line, so that the command exits with an error.

    Raises:
        UserError: if there are failures.
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


def _open_sources(options: argparse.Namespace) -> list[Any]:
    """Open the data sources, after checking that they can be measured as asked."""
    from data.sources import CHARACTERS_PER_TOKEN, open_source, open_text
    from vlm_distill.config.sections import Measure
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


def _open_benchmarks(options: argparse.Namespace) -> OpenBenchmarks:
    """Open the benchmarks, and print what is wrong with their files."""
    from vlm_distill.evaluation.benchmark_run import open_benchmarks

    if len(options.data) > 1:
        raise UserError("--data: with --benchmarks it is the one folder that their files are in")
    opened = open_benchmarks(
        _benchmark_names(options),
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


def _run_sources(
    options: argparse.Namespace,
    sources: Sequence[Any],
    model: VisionLanguageModel,
    teacher: ModelTeacher | None,
    ranks: RankShare,
) -> dict[str, str]:
    """Measure the model on data sources; return name and reason of those without a valid score."""
    from data.collate import Collator
    from data.images import load_image
    from vlm_distill.evaluation.source_run import Measuring, run_source

    collator = Collator(model.processor, teacher and teacher.processor, options.max_length)
    measuring = Measuring(options.measures.split(","), collator, teacher)
    asking = Asking(
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
        load=partial(load_image, roots=options.root),
    )
    answers_by = _identity(options, model)
    failures: dict[str, str] = {}
    for source in sources:
        about = {"source": source.name, "name": options.model}
        folder = AnswerFolder(options.out / source.name, options.model, answers_by, about)
        result = run_source(
            model, source, measuring, asking, ranks=ranks, folder=folder, feedback=_feedback(source.name, ranks)
        )
        for mistake in too_much_left_out(source.name, result.values["n"], result.skipped, options.max_bad):
            failures[source.name] = mistake.removeprefix(f"{source.name}: ")
        if ranks.first:
            _print_source(source.name, result, folder.path)
    return failures


def _print_source(name: str, result: SourceResult, folder: Path) -> None:
    from rich.table import Table

    from vlm_distill.evaluation.held_out import measured_in_words

    print(f"{name}: {measured_in_words(result.values)}")
    if "exact" in result.values and result.by_type:
        table = Table("questions", "n", "exact match", "VQA accuracy")
        for kind, row in result.by_type.items():
            table.add_row(kind, str(row["n"]), f"{row['exact']:.2%}", f"{row['soft']:.2%}")
        plain_console().print(table)
    _print_skipped(result.skipped)
    print(folder)


def _run_benchmarks(
    options: argparse.Namespace, opened: OpenBenchmarks, model: VisionLanguageModel, ranks: RankShare
) -> dict[str, str]:
    """Ask and score benchmarks; return name and reason of those without a valid score."""
    from data.images import load_image
    from vlm_distill.evaluation.benchmark_lookup import data_folder, entry_name, get_benchmark
    from vlm_distill.evaluation.benchmark_results import write_summary
    from vlm_distill.evaluation.benchmark_run import run_benchmark
    from vlm_distill.reporting.score_tables import print_results

    judge = open_judge(options.judge, options.judge_model, options.judge_rate, options.out)
    names = {get_benchmark(name).name: entry_name(name) for name in _benchmark_names(options)}
    # `vlm-distill score` finds the right answers again by these.
    where = {
        "data": str(data_folder(options.data[0] if options.data else None).resolve()),
        "format": options.format,
        "images": None if options.images is None else str(options.images.resolve()),
    }
    asking = Asking(
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
        # Decode images as VLMEvalKit and lmms-eval do.
        load=partial(load_image, roots=options.root, alpha="drop"),
    )
    answers_by = _identity(options, model)
    results = []
    for benchmark in opened.ready:
        name = benchmark.name
        about = {"entry": names[name], **where}
        result = run_benchmark(
            model,
            benchmark,
            asking,
            judge=judge,
            likelihood=options.score == "likelihood",
            ranks=ranks,
            folder=AnswerFolder(options.out / name, options.model, answers_by, about),
            feedback=_feedback(name, ranks),
        )
        if result is not None:
            results.append(result)
            _print_skipped(result.skipped)
    failures = opened.failures | {result.benchmark: result.failure for result in results if result.failure is not None}
    for result in results:
        for mistake in too_much_left_out(result.benchmark, result.n, result.skipped, options.max_bad):
            failures[result.benchmark] = mistake.removeprefix(f"{result.benchmark}: ")
    if results:
        write_summary(options.out, results, failures)
        print_results(results)
        print(options.out / "scores.csv")
    return failures


def _benchmark_names(options: argparse.Namespace) -> list[str]:
    return [name for listed in options.benchmarks for name in listed.split(",")]


def _identity(options: argparse.Namespace, model: VisionLanguageModel) -> dict[str, Any]:
    """Return what the answers depend on besides the questions."""
    return {**identity(options.model, model), "roots": [str(root.resolve()) for root in options.root]}


def _feedback(name: str, ranks: RankShare) -> Feedback:
    progress = progress_line(f"{name}, answers") if ranks.first else None
    return Feedback(progress, partial(print, file=sys.stderr, flush=True))


def open_judge(url: str | None, model: str, requests_per_minute: float | None, out: Path) -> Judge | None:
    """Return the judge at an address, which keeps its replies in ``out``; ``None`` without an address."""
    from vlm_distill.evaluation.judge import Judge

    if url is None:
        return None
    show = progress_line("judge, replies")
    return Judge(url, model, out / "judge.jsonl", requests_per_minute=requests_per_minute, progress=show)


def _print_skipped(skipped: Sequence[Problem]) -> None:
    if skipped:
        first = skipped[0]
        print(f"{len(skipped)} left out, the first: {first.source}, line {first.line}: {first.reason}")


if __name__ == "__main__":
    leave(main())
