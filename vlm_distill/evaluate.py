"""One rank of an evaluation: ``python -m vlm_distill.evaluate --model M --benchmarks pope --out DIR``.

The launchers start it on several processes as they start training; each answers its share of the questions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from data.batch import Problem
from data.errors import UserError
from vlm_distill.console import plain_console
from vlm_distill.evaluation.scoring.base import Rules
from vlm_distill.launch import guarded, leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers and scores; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="vlm_distill.evaluate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name of a model")
    parser.add_argument("--benchmarks", action="append", default=[], help="names or YAML files; may be repeated")
    parser.add_argument("--data", action="append", default=[], help="files of questions, or the benchmarks' folder")
    parser.add_argument("--rules", choices=get_args(Rules), default="vlmevalkit")
    parser.add_argument("--format", choices=["tsv", "huggingface", "official", "source", "text"], help="of the files")
    parser.add_argument("--score", choices=["generate", "likelihood"], default="generate")
    parser.add_argument("--measures", default="exact", help="of data: exact, rouge_l, perplexity, kl; commas between")
    parser.add_argument("--teacher", help="a model that kl is measured from")
    parser.add_argument("--max-length", type=int, default=2048, help="most tokens of a sample, for perplexity and kl")
    parser.add_argument("--judge", help="base address of an OpenAI-compatible endpoint")
    parser.add_argument("--judge-model", default="judge", help="the judge's name there")
    parser.add_argument("--judge-rate", type=float, help="most requests a minute")
    parser.add_argument("--images", type=Path, help="folder that image paths are relative to")
    parser.add_argument("--root", type=Path, action="append", default=[], help="read no image outside; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions and scores")
    parser.add_argument("--max-bad", type=float, default=0.5, help="most of the questions to leave out, 0 to 1")
    parser.add_argument("--limit", type=int, help="ask this many questions, evenly spaced")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, help="default: the benchmark's own, or 32")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: as saved; fp32 on a CPU")
    parser.add_argument("--shard", action="store_true", help="each process holds its share of the weights (ZeRO-3)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(given)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Everything the options name, answered, scored, written and shown."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from vlm_distill.models import load_vlm
    from vlm_distill.models.common import DTYPES
    from vlm_distill.models.teacher import ModelTeacher
    from vlm_distill.models.vocabulary import align_heads
    from vlm_distill.training.engine import Processes, load_sharded

    # Mistakes are told before a model is loaded.
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
        if options.teacher is not None:
            teacher = load_vlm(options.teacher, dtype=dtype).to(processes.device)
            align_heads(model, teacher)
            options.teacher = ModelTeacher(teacher)
        settings = {
            "batch_size": options.batch_size,
            "limit": options.limit,
            "rank": processes.rank,
            "world": processes.world,
            "all_gather": processes.gather,
            "resume": identity(options.model),
        }
        (_score_benchmarks if options.benchmarks else _score_sources)(options, opened, model, settings)
    finally:
        processes.close()


def _sources(options: argparse.Namespace) -> list[Any]:
    from data.sources import CHARACTERS_PER_TOKEN, open_source, open_text
    from vlm_distill.config import Measure
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
        return [open_text(path, CHARACTERS_PER_TOKEN * options.max_length) for path in options.data]
    sources: list[Any] = [open_source(path, images=options.images) for path in options.data]
    if len({source.name for source in sources}) < len(sources):
        raise UserError("--data: two files have one name, so that their scores would overwrite each other; rename one")
    return sources


def _score_sources(
    options: argparse.Namespace, sources: Sequence[Any], model: Any, settings: Mapping[str, Any]
) -> None:
    from rich.table import Table

    from data.collate import Collator
    from data.images import load_image
    from vlm_distill.evaluation.held_out import OF_ANSWERS, add_to_scores, measure, measured_in_words
    from vlm_distill.evaluation.rouge import mean_rouge_l
    from vlm_distill.evaluation.runner import evaluate, summarise

    mistakes: list[str] = []
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
                max_new_tokens=options.max_new_tokens or 32,
                out=options.out / source.name,
                load=load,
                skipped=skipped,
                **settings,
            )
            scores = summarise(predictions)
            values["n"] = scores["n"]
            if "exact" in measures:
                values |= {"exact": scores["exact"], "soft": scores["soft"]}
            if "rouge_l" in measures and predictions:
                values["rouge_l"] = mean_rouge_l(predictions)
        if not set(measures) <= OF_ANSWERS:
            ranks = {key: settings[key] for key in ("limit", "rank", "world", "all_gather")}
            found = measure(model, teacher, source, collator, load=load, skipped=skipped, **ranks)
            values |= {"n": found.n, **found.values(measures)}
        mistakes += too_much_left_out(source.name, values["n"], skipped, options.max_bad)
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
    if mistakes:
        raise UserError("; ".join(mistakes))


def _benchmarks(options: argparse.Namespace) -> list[Any]:
    """Entries with their open questions."""
    from vlm_distill.evaluation.benchmark_run import open_benchmarks

    if len(options.data) > 1:
        raise UserError("--data: with --benchmarks it is the one folder that their files are in")
    folder = options.data[0] if options.data else None
    names = [name for given in options.benchmarks for name in given.split(",")]
    opened, told = open_benchmarks(names, folder, options.rules, format=options.format, images=options.images)
    if os.environ.get("RANK", "0") == "0":
        for text in told:
            print(f"warning: {text}", file=sys.stderr)
    return opened


def _score_benchmarks(
    options: argparse.Namespace, opened: Sequence[Any], model: Any, settings: Mapping[str, Any]
) -> None:
    from data.images import load_image
    from vlm_distill.evaluation.benchmark_run import run_benchmark, write_summary
    from vlm_distill.evaluation.judge import Judge

    judge = None
    if options.judge is not None:
        cache = options.out / "judge.jsonl"
        judge = Judge(options.judge, options.judge_model, cache, requests_per_minute=options.judge_rate)
    results, mistakes = [], list[str]()
    for entry, questions in opened:
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
            # As VLMEvalKit and lmms-eval decode images.
            load=partial(load_image, roots=options.root, alpha="drop"),
            **settings,
        )
        if result is not None:
            results.append(result)
            _tell_skipped(result.skipped)
            mistakes += too_much_left_out(entry.name, len(result.predictions), result.skipped, options.max_bad)
    if results:
        write_summary(options.out, results)
        _show(results)
        print(options.out / "scores.csv")
    if mistakes:
        raise UserError("; ".join(mistakes))


def _show(results: Sequence[Any]) -> None:
    from rich.table import Table

    from vlm_distill.evaluation.benchmark_run import average

    table = Table("benchmark", "rules", "n", "metric", "score", "what to know")
    for result in results:
        scores = result.scores
        notes = (
            [f"{count} decided by {reason}" for reason, count in scores.fallbacks.items() if count] if scores else []
        )
        if scores is not None and scores.judge:
            notes.append(f"{len(scores.judge)} answers need a judge (--judge)")
        if not result.predictions:
            notes.append("no question could be used")
        elif scores is None:
            notes.append("right answers are not published: predictions only")
        main = "" if scores is None else f"{scores.main:.2f}"
        table.add_row(
            result.benchmark, result.rules, str(len(result.predictions)), result.metric, main, "; ".join(notes)
        )
    plain_console().print(table)
    mean = average(results)
    if mean is not None:
        print(f"average of the eight, as the Open VLM Leaderboard has it: {mean}")


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


def identity(model: str) -> str:
    """A name or a folder, with what tells one state of its weights from another."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return " ".join([model, *(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)])


if __name__ == "__main__":
    leave(main())
