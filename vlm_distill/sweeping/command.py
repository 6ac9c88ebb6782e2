"""``vlm-distill sweep``: run what is not finished, report what failed, print and write the table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from data.errors import UserError
from vlm_distill.config.differences import PLACES, flattened
from vlm_distill.config.kinds import read_run
from vlm_distill.runtime.console import print_whole

from .grid import Sweep, SweepRun, python_line, shell_line
from .record import SweepRecord, record_of, write_record
from .results import in_words, read_results
from .running import Failed, Job, Machine, run_jobs
from .table import LEGEND, tables

#: Makes the words to start from those of ``vlm-distill``.
Starter = Callable[[Sequence[str]], Sequence[str]]


def run_sweep(sweep: Sweep, at_once: int, nproc: int | None, start: Starter = python_line) -> list[Failed]:
    """Run the sweeps that this one needs, fill its caches, then run everything that is not finished.

    Args:
        sweep: what to run.
        at_once: runs at a time.
        nproc: ranks of each run; ``None``: one for each of its GPUs.
        start: for tests.

    Returns:
        The runs that failed.

    Raises:
        UserError: a run of a sweep that this one needs failed, or a finished run had other settings.
    """
    check_finished(sweep)
    for other in sweep.first:
        failures = run_sweep(other, at_once, nproc, start)
        if failures:
            tell_failures(failures)
            raise UserError(f"{other.path}: {len(failures)} of its runs failed, and {sweep.path} needs them all")
    write_record(record_of(sweep))
    open_runs = [run for run in sweep.distinct if not run.done]
    finished = len(sweep.distinct) - len(open_runs)
    already = f", {finished} of them finished" if finished else ""
    print(f"{sweep.path}: {len(sweep.distinct)} runs{already}; {at_once} at once, in {sweep.output}", flush=True)
    machine, total = Machine(at_once, nproc), len(sweep.distinct)

    # A cache that cannot be filled fails the runs that need it, with their own messages.
    caches = [_job(f"cache {', '.join(run.caches)}", run, "cache", nproc, start) for run in _fillers(open_runs)]
    failures = run_jobs(caches, machine, lambda job, failure: _say(job.name, failure))
    counter = partial(_tell_ended, counted=[finished], total=total)
    jobs = [_job(run.name, run, run.command, nproc, start) for run in open_runs]
    return failures + run_jobs(jobs, machine, counter)


def commands(sweep: Sweep, nproc: int | None) -> list[list[str]]:
    """Return the commands of everything that is not finished, for a scheduler, in stages.

    Those of a stage may run at once; those of the next one need them all: the runs of other sweeps, then caches, then
    this sweep's runs.
    """
    check_finished(sweep)
    stages: list[list[str]] = []
    for other in sweep.first:
        stages += commands(other, nproc)
    open_runs = [run for run in sweep.distinct if not run.done]
    stages.append([shell_line(run.words("cache", nproc)) for run in _fillers(open_runs)])
    stages.append([shell_line(run.words(run.command, nproc)) for run in open_runs])
    return [stage for stage in stages if stage]


def print_commands(sweep: Sweep, nproc: int | None) -> None:
    """Print one command a line on standard output, and on standard error how many must end before the next ones.

    Where nothing is left to run, standard error says so.
    """
    stages = commands(sweep, nproc)
    if not stages:
        print(f"{sweep.path}: all {len(sweep.distinct)} runs are finished", file=sys.stderr, flush=True)
    if len(stages) > 1:
        counts = ", then ".join(str(len(stage)) for stage in stages)
        print(f"in stages, each after the one before has ended: {counts} commands", file=sys.stderr, flush=True)
    for stage in stages:
        for line in stage:
            print(line)


def check_finished(sweep: Sweep) -> None:
    """Refuse finished runs with settings that the sweep no longer has.

    Raises:
        UserError: names the first one, and the settings.
    """
    for run in sweep.distinct:
        saved = run.folder / "config.yaml"
        if not (run.done and saved.is_file()):
            continue
        before, now = flattened(read_run(saved)), flattened(run.settings)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in PLACES]
        if changed:
            key = changed[0]
            raise UserError(
                f"{run.folder}: finished with {key} {before.get(key)!r}, and the sweep says {now.get(key)!r}; choose "
                "another output, or delete the folder to run it again"
            )


def tell_failures(failures: Sequence[Failed]) -> None:
    """Name the failed runs, each with its last line and its log."""
    for failure in failures:
        print(f"failed: {failure.job.name}: {failure.said} ({failure.job.log})", file=sys.stderr, flush=True)


def show_table(sweep: SweepRecord) -> None:
    """Print the tables of a sweep's finished runs, and write its page, CSV and LaTeX."""
    results = read_results(sweep)
    if not results:
        return
    for table in tables(sweep, results):
        print_whole(table)
    if sweep.baseline is not None:
        print(f"baseline: {sweep.baseline[1]}. {LEGEND}")
    # Imported late: the process that waits for runs does not need what pages do.
    from .page import write_sweep

    print(write_sweep(sweep))


def _fillers(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Return the first run for each set of caches."""
    found: dict[tuple[str, ...], SweepRun] = {}
    for run in runs:
        if run.caches:
            found.setdefault(run.caches, run)
    return list(found.values())


def _job(name: str, run: SweepRun, command: str, nproc: int | None, start: Starter) -> Job:
    log = run.folder.with_name(f"{run.folder.name}.{command}.log")
    return Job(name, start(run.words(command, nproc)), log, run)


def _tell_ended(job: Job, failure: Failed | None, *, counted: list[int], total: int) -> None:
    counted[0] += 1
    _say(f"[{counted[0]}/{total}] {job.name}", failure, job.subject.folder)


def _say(name: str, failure: Failed | None, run: Path | None = None) -> None:
    if failure is not None:
        print(f"{name}: FAILED: {failure.said}", flush=True)
    elif run is None:
        print(f"{name}: filled", flush=True)
    else:
        print(f"{name}: {in_words(run)}", flush=True)
