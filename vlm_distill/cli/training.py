"""Commands around a run: train, classify, sweep, cache, generate, plan, inspect."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.gpus import process_count
from vlm_distill.runtime.launch import launch, launch_training

from .options import Processes, RunOptions, expanded, words_of


@dataclass(kw_only=True)
class TrainOptions(RunOptions):
    """A run, or a trial of it."""

    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Try the run: a few steps, rows and questions, in a folder of its own."),
    ] = False


@expanded
def train(options: TrainOptions, nproc: Processes = None) -> None:
    """Train a student as CONFIG says, evaluate it and its teacher, and export it.

    An interrupted run resumes from its latest checkpoint when started again. On many nodes, use DeepSpeed's own
    launcher and a hostfile: deepspeed --module vlm_distill.train CONFIG.
    """
    from vlm_distill.config.sections import RunConfig

    _start("vlm_distill.train", options, RunConfig, nproc)


@expanded
def classify(options: TrainOptions, nproc: Processes = None) -> None:
    """Train an image classifier as CONFIG says, evaluate it and its teacher, and export it.

    The suite's second path: ImageNet, CIFAR or any folder of images. `vlm-distill configs imagenet` and
    `vlm-distill configs cifar100` list recipes. With DeepSpeed's own launcher: deepspeed --module vision.train CONFIG.
    """
    from vlm_distill.config.kinds import classifier_kind

    _start("vision.train", options, classifier_kind(), nproc)


def _start(module: str, options: TrainOptions, kind: type[Any], nproc: int | None) -> NoReturn:
    """Report mistakes in a configuration, then start its ranks and end with their exit code."""
    # Nothing that takes seconds to import is imported here: the ranks do that.
    from vlm_distill.config.batch_split import split_batch
    from vlm_distill.config.file import load_config

    config = load_config(options.config, options.overrides or (), kind)
    ranks = process_count(nproc, config.training.device)
    split_batch(config, ranks)
    words = words_of(options, RunOptions)
    if options.smoke:
        from .smoke import write_smoke_run

        words = [str(write_smoke_run(config, options.config))]
    raise typer.Exit(launch_training(module, words, ranks))


@dataclass(kw_only=True)
class SweepOptions:
    """What to compare, and how much of it at once."""

    sweep: Annotated[
        Path,
        typer.Argument(help="A sweep's file, or a run's configuration to compare settings of.", show_default=False),
    ]
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="section.key=a,b,c compares values; section.key=value is for all runs; axis=names chooses settings.",
            show_default=False,
        ),
    ] = None
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once; each gets its share of the cores, or its GPUs.")] = 1
    limit: Annotated[str | None, typer.Option(help="Name of a smaller sweep that the file describes.")] = None
    print: Annotated[bool, typer.Option("--print", help="Print the commands, one a line, instead of running them.")] = (
        False
    )


@expanded
def sweep(options: SweepOptions, nproc: Processes = None) -> None:
    """Run a configuration in several settings with several seeds, and compare them.

    Finished runs are not run again, and interrupted ones resume. A run that fails is reported and skipped; the exit
    code is then 1. The documentation's page on sweeps describes the file.
    """
    from vlm_distill.sweeping.command import print_commands, run_sweep, show_table, tell_failures
    from vlm_distill.sweeping.grid import read_sweep
    from vlm_distill.sweeping.record import record_of

    found = read_sweep(options.sweep, options.words or (), options.limit, nproc)
    if options.print:
        print_commands(found, nproc)
        return
    failures = run_sweep(found, options.jobs, nproc)
    show_table(record_of(found))
    if failures:
        tell_failures(failures)
        raise typer.Exit(1)


@expanded
def cache(run: RunOptions, nproc: Processes = None) -> None:
    """Run CONFIG's teacher once over all of its data and store the outputs in teacher.cache.folder.

    Training then reads them from there and never loads the teacher. With student.vision_cache, the features of a
    frozen vision encoder are stored in the same way. An interrupted fill resumes when started again.
    """
    from vlm_distill.config.checks import check_caches
    from vlm_distill.config.file import load_config

    config = load_config(run.config, run.overrides or ())
    check_caches(config)
    ranks = process_count(nproc, config.training.device)
    raise typer.Exit(launch("vlm_distill.cache", words_of(run), ranks))


@dataclass(kw_only=True)
class GenerateOptions(RunOptions):
    """What to generate, with which model, and where to write it."""

    out: Annotated[Path, typer.Option(help="JSONL file to write.", show_default=False)]
    model: Annotated[str | None, typer.Option(help="Folder or name of a model to use instead of the teacher.")] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens; longer answers are left out.")] = 512
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy decoding.")] = 0.0
    samples: Annotated[int, typer.Option(min=1, help="Answers to draw per question.")] = 1
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 64


@expanded
def generate(options: GenerateOptions, nproc: Processes = None) -> None:
    """Write the teacher's answers to CONFIG's training questions as data, for sequence-level distillation.

    An interrupted command resumes when started again.
    """
    from vlm_distill.config.file import load_config

    config = load_config(options.config, options.overrides or ())
    ranks = process_count(nproc, config.training.device)
    raise typer.Exit(launch("vlm_distill.generate", words_of(options), ranks))


@dataclass(kw_only=True)
class PlanOptions(RunOptions):
    """The hardware that a run is planned for."""

    gpus: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1
    memory: Annotated[float | None, typer.Option(min=0.001, help="GB per GPU; default: the device's.")] = None
    device: Annotated[str, typer.Option(help="Device to plan for: h100, a100, …, or cpu.")] = "h100"
    json: Annotated[Path | None, typer.Option(help="File to write; default: plan.json in the run's folder.")] = None


@expanded
def plan(options: PlanOptions) -> None:
    """Estimate a run without loading weights: parameters, memory by ZeRO stage, FLOPs, tokens, time and GPU-hours.

    For a classifier, it estimates neither tokens nor time.

    The run's report shows the plan beside what was measured. The documentation's page on
    planning says what is counted, and how well.
    """
    from vlm_distill.config.file import load_config
    from vlm_distill.config.kinds import kind_of
    from vlm_distill.config.sections import RunConfig

    kind = kind_of(options.config)
    config = load_config(options.config, options.overrides or (), kind)
    # Imported after the configuration is checked, since these take seconds.
    from vlm_distill.reporting.plan_tables import render, write_plan

    # A classifier's by name: nothing in vlm_distill depends on vision.
    planning = import_module("vlm_distill.planning" if kind is RunConfig else "vision.planning")
    made = planning.plan(config, gpus=options.gpus, memory=options.memory, device=options.device)
    render(made, plain_console())
    print(write_plan(made, options.json or Path(config.output) / "plan.json"))


@dataclass(kw_only=True)
class InspectOptions(RunOptions):
    """Which samples to show, and where."""

    samples: Annotated[
        int | None, typer.Option(min=1, help="How many samples; default: 4, or all of them with --json.")
    ] = None
    html: Annotated[Path | None, typer.Option(help="Also write a page with the images.")] = None
    json: Annotated[
        Path | None, typer.Option(help="Write what training would learn, one line per sample; - for standard output.")
    ] = None


@expanded
def inspect(options: InspectOptions) -> None:
    """Show samples as each model receives them, with supervised tokens highlighted."""
    from vlm_distill.config.file import load_config
    from vlm_distill.inspection import Inspection
    from vlm_distill.reporting.inspection_page import render_html, render_terminal, write_lines

    inspection = Inspection(load_config(options.config, options.overrides or ()))
    out = sys.stdout
    if options.json is not None:
        # With `--json -`, standard output holds the lines alone.
        out = sys.stderr if options.json == Path("-") else out
        write_lines(inspection.lines(options.samples), options.json)
        print(inspection.summary(), file=out)
        if options.html is None:
            return
    shown = inspection.shown(options.samples or 4)
    if options.json is None:
        render_terminal(shown, plain_console())
        print(inspection.summary())
    if options.html is not None:
        print(render_html(shown, options.html), file=out)
