"""One rank of an evaluation: ``python -m vlm_distill.eval --model M --benchmarks pope --out DIR``.

Launchers start it on several processes, as they do for training; each answers its share of the questions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vlm_distill.neighbours import check_neighbours

check_neighbours()  # before anything of `data` is imported

from data.batch import Problem
from data.errors import UserError
from vlm_distill.cli.evaluation import RankEvalOptions
from vlm_distill.cli.options import parse
from vlm_distill.evaluation.answering import Asking, Feedback
from vlm_distill.evaluation.kept_answers import AnswerFolder
from vlm_distill.evaluation.left_out import report_failures, too_much_left_out
from vlm_distill.evaluation.model_identity import identity, student_of
from vlm_distill.runtime.console import plain_console, progress_line
from vlm_distill.runtime.launch import guarded, leave
from vlm_distill.runtime.rank_share import RankShare

if TYPE_CHECKING:
    from vlm_distill.config.sections import VideoSection
    from vlm_distill.evaluation.benchmark_run import OpenBenchmarks
    from vlm_distill.evaluation.benchmark_scores import Result
    from vlm_distill.evaluation.source_run import SourceResult
    from vlm_distill.models.interface import VisionLanguageModel
    from vlm_distill.models.teacher import ModelTeacher
    from vlm_distill.runtime.processes import Processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer and score; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: run(parse(RankEvalOptions, given, "vlm_distill.eval", __doc__)))


class Printed:
    """Prints what an evaluation finds, on the first rank."""

    def warn(self, text: str) -> None:
        """Print a warning about the benchmarks' files."""
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {text}", file=sys.stderr)

    def feedback(self, name: str) -> Feedback:
        """Return what is shown while questions are answered."""
        return Feedback(progress_line(f"{name}, answers"), partial(print, file=sys.stderr, flush=True))

    def source(self, name: str, result: SourceResult, folder: Path) -> None:
        """Print what was measured on a source."""
        from rich.table import Table

        from vlm_distill.evaluation.held_out import measured_in_words

        print(f"{name}: {measured_in_words(result.values)}")
        if "exact" in result.values and result.by_type:
            table = Table("questions", "n", "exact match", "VQA accuracy")
            for kind, row in result.by_type.items():
                table.add_row(kind, str(row["n"]), f"{row['exact']:.2%}", f"{row['soft']:.2%}")
            plain_console().print(table)
        self.skipped(result.skipped)
        print(folder)

    def skipped(self, problems: Sequence[Problem]) -> None:
        """Print how many questions were left out."""
        if problems:
            first = problems[0]
            print(f"{len(problems)} left out, the first: {first.source}, line {first.line}: {first.reason}")

    def benchmarks(self, results: Sequence[Result], out: Path) -> None:
        """Print the scores of benchmarks."""
        from vlm_distill.reporting.score_tables import print_results

        print_results(results)
        print(out / "scores.csv")

    def failures(self, found: Mapping[str, str]) -> None:
        """Print name and reason of what has no valid score; raise ``UserError`` if there is something."""
        report_failures(found)


def run(options: RankEvalOptions) -> None:
    """Ask everything that the options name, score the answers, write and print the scores."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shown = Printed()
    _, failures = answer(options, shown)
    shown.failures(failures)


def answer(options: RankEvalOptions, shown: Printed) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Ask everything that the options name, score the answers and write the scores.

    Returns:
        On the first rank scores by name, and name and reason of what has none that is valid; empty on other ranks.
    """
    from vlm_distill.runtime.processes import Processes

    # Report mistakes before a model is loaded.
    if options.images is not None and not options.images.is_dir():
        raise UserError(f"--images: there is no folder {options.images}")
    options.model = student_of(options.model)
    benchmarks = _open_benchmarks(options, shown) if options.benchmarks else None
    sources = [] if options.benchmarks else _open_sources(options)

    processes = Processes()
    try:
        model, _engine = _load_model(options, processes)  # the engine must live as long as the model is asked
        ranks = processes.share
        if benchmarks is not None:
            found = _run_benchmarks(options, benchmarks, model, ranks, shown)
        else:
            teacher = _load_teacher(options, model, processes)
            found = _run_sources(options, sources, model, teacher, ranks, shown)
    finally:
        processes.close()
    return found if ranks.first else ({}, {})


def _load_model(options: RankEvalOptions, processes: Processes) -> tuple[VisionLanguageModel, Any]:
    """Return the model in evaluation mode, and the engine that holds its shards, if any."""
    from vlm_distill.models import load_vlm
    from vlm_distill.models.common import DTYPES

    engine: Any = None
    if options.shard:
        from vlm_distill.training.engine import load_sharded

        dtype = DTYPES[_dtype(options, processes) or "bf16"]
        model, engine = load_sharded(lambda: load_vlm(options.model, dtype=dtype), dtype, processes)
    else:
        model = load_vlm(options.model, dtype=_dtype(options, processes)).to(processes.device)
    model.eval()
    model.processor.set_template_arguments(options.template_arguments or {}, "--template-arguments")
    _set_video(options, model)
    return model, engine


def _set_video(options: RankEvalOptions, model: VisionLanguageModel) -> None:
    """Tell a model's processor how many frames a video has at most."""
    section = _video(options)
    model.processor.video_frames = None if section is None else section.max_frames


def _video(options: RankEvalOptions) -> VideoSection | None:
    from vlm_distill.config.sections import VideoSection

    return None if options.video_sampling is None else VideoSection(**options.video_sampling)


def _load_teacher(options: RankEvalOptions, model: VisionLanguageModel, processes: Processes) -> ModelTeacher | None:
    """Return the model that kl is measured from, if any."""
    from vlm_distill.models import load_vlm
    from vlm_distill.models.teacher import ModelTeacher
    from vlm_distill.models.vocabulary import align_heads

    if options.teacher is None:
        return None
    teacher = load_vlm(options.teacher, dtype=_dtype(options, processes)).to(processes.device)
    arguments = options.teacher_template_arguments or {}
    teacher.processor.set_template_arguments(arguments, "--teacher-template-arguments")
    _set_video(options, teacher)
    align_heads(model, teacher)
    return ModelTeacher(teacher)


def _dtype(options: RankEvalOptions, processes: Processes) -> str | None:
    # A CPU gains nothing from 16 bits, and some of its layers refuse them.
    return options.dtype or ("fp32" if processes.device.type == "cpu" else None)


def _open_sources(options: RankEvalOptions) -> list[Any]:
    """Open the data sources, after checking that they can be measured as asked."""
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
        raise UserError("--format text: plain text has no questions to answer; choose --measures perplexity or kl")
    if not options.data:
        raise UserError("nothing to ask: name benchmarks (--benchmarks) or files of questions (--data)")
    if options.format == "text":
        if options.columns or options.layout:
            raise UserError("--columns, --layout: plain text has no columns; leave them out")
        return [open_text(path, CHARACTERS_PER_TOKEN * options.max_length) for path in options.data]
    read_as: dict[str, Any] = {"images": options.images, "columns": options.columns, "layout": options.layout}
    sources: list[Any] = [open_source(path, **read_as) for path in options.data]
    if len({source.name for source in sources}) < len(sources):
        raise UserError("--data: two files have the same name, so their scores would overwrite each other; rename one")
    return sources


def _open_benchmarks(options: RankEvalOptions, shown: Printed) -> OpenBenchmarks:
    """Open the benchmarks, and show what is wrong with their files."""
    from vlm_distill.evaluation.benchmark_run import open_benchmarks

    if len(options.data) > 1:
        raise UserError("--data: with --benchmarks, name the one folder that holds their files")
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
        shown.failures(opened.failures)
    for text in opened.warnings:
        shown.warn(text)
    for name, reason in opened.failures.items():
        shown.warn(f"{name} is left out: {reason}")
    return opened


def _run_sources(
    options: RankEvalOptions,
    sources: Sequence[Any],
    model: VisionLanguageModel,
    teacher: ModelTeacher | None,
    ranks: RankShare,
    shown: Printed,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Measure the model on data sources; return the scores, and name and reason of those without a valid one."""
    from data.collate import Collator
    from data.sample_images import ImageLoader
    from vlm_distill.evaluation.source_run import Measuring, run_source
    from vlm_distill.training.open_data import video_limits

    collator = Collator(model.processor, None if teacher is None else teacher.processor, options.max_length)
    measuring = Measuring(options.measures.split(","), collator, teacher)
    asking = Asking(
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
        load=ImageLoader(options.root, video=video_limits(_video(options))),
    )
    answers_by = _identity(options, model)
    scores: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for source in sources:
        about = {"source": source.name, "name": options.model}
        folder = AnswerFolder(options.out / source.name, options.model, answers_by, about)
        feedback = shown.feedback(source.name) if ranks.first else Feedback()
        result = run_source(model, source, measuring, asking, ranks=ranks, folder=folder, feedback=feedback)
        scores[source.name] = {**result.values, "by_type": result.by_type}
        for mistake in too_much_left_out(source.name, result.values["n"], result.skipped, options.max_bad):
            failures[source.name] = mistake.removeprefix(f"{source.name}: ")
        if ranks.first:
            shown.source(source.name, result, folder.path)
    return scores, failures


def _run_benchmarks(
    options: RankEvalOptions, opened: OpenBenchmarks, model: VisionLanguageModel, ranks: RankShare, shown: Printed
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Ask and score benchmarks; return the scores, and name and reason of those without a valid one."""
    from data.images import load_image
    from vlm_distill.evaluation.benchmark_lookup import data_folder, entry_name, get_benchmark
    from vlm_distill.evaluation.benchmark_run import run_benchmark
    from vlm_distill.evaluation.benchmark_scores import summary, write_summary
    from vlm_distill.evaluation.judge import open_judge

    judge = open_judge(options.judge, options.judge_model, options.judge_rate, options.out)
    names = {get_benchmark(name).name: entry_name(name) for name in _benchmark_names(options)}
    # With these, `vlm-distill score` finds the right answers again.
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
            feedback=shown.feedback(name) if ranks.first else Feedback(),
        )
        if result is not None:
            results.append(result)
            shown.skipped(result.skipped)
    failures = opened.failures | {result.benchmark: result.failure for result in results if result.failure is not None}
    for result in results:
        for mistake in too_much_left_out(result.benchmark, result.n, result.skipped, options.max_bad):
            failures[result.benchmark] = mistake.removeprefix(f"{result.benchmark}: ")
    if results:
        write_summary(options.out, results, failures)
        shown.benchmarks(results, options.out)
    return {result.benchmark: summary(result) for result in results}, failures


def _benchmark_names(options: RankEvalOptions) -> list[str]:
    return [name for listed in options.benchmarks for name in listed.split(",")]


def _identity(options: RankEvalOptions, model: VisionLanguageModel) -> dict[str, Any]:
    """Return what the answers depend on besides the questions."""
    found = {**identity(options.model, model), "roots": [str(root.resolve()) for root in options.root]}
    section = _video(options)
    return found if section is None else {**found, "video": section.model_dump()}


if __name__ == "__main__":
    leave(main())
