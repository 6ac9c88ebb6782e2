"""The demo of classifiers: a student alone and by KD, DKD and TAID, three seeds each: ``python -m vision.demo``.

Its runs are those of ``configs/demo/vision``, on Fashion-MNIST if Debian's package is installed or can be fetched,
else on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data.errors import UserError
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.launch import Stopped, cores, guarded

FASHION = Path("/usr/share/datasets/fashion-mnist")
METHODS = {"alone": "alone", "kd": "KD", "dkd": "DKD", "taid": "TAID"}
SEEDS = (0, 1, 2)
_PACKAGE = "dataset-fashion-mnist"
_DOWNLOAD_SECONDS = 60


class Job(NamedTuple):
    """A training: a file of ``configs/demo/vision``, its overrides, and the run's folder."""

    config: str
    overrides: tuple[str, ...]
    folder: Path


def run(out: Path, nproc: int, *, seeds: Sequence[int] = SEEDS, overrides: Sequence[str] = ()) -> Path:
    """Train the teacher and all students, ``nproc`` at once; print a table and write the report.

    Args:
        out: folder of data, runs and report.
        nproc: processes; each trains one model after the other on its share of the cores.
        seeds: the students' seeds; the teacher takes the first.
        overrides: for every run.

    Returns:
        The report.

    Raises:
        UserError: there is no data, or a run's configuration is wrong.
    """
    from vlm_distill.reporting.report import write_report

    console = plain_console(stderr=True)
    data, title = prepare(out / "data")
    console.print(f"{title}: a teacher, and a student in {len(METHODS)} ways with {len(seeds)} seeds")
    given = [f"data.train.0.path={data}", f"data.eval.0.path={data}", *overrides]

    def job(name: str, folder: Path, *more: str) -> Job:
        return Job(f"{name}.yaml", (*given, *more, f"output={folder}"), folder)

    teacher = job("teacher", out / "teacher", f"training.seed={seeds[0]}")
    students: dict[str, list[Job]] = {}
    for name in METHODS:
        taught_by = [] if name == "alone" else [f"teacher.name={teacher.folder / 'student'}"]
        students[name] = []
        for seed in seeds:
            students[name].append(job(name, out / name / f"seed{seed}", f"training.seed={seed}", *taught_by))
    with processes(nproc, out / "log") as pool, _bar(console, 1 + len(METHODS) * len(seeds)) as bar:
        # Students without a teacher keep the other processes busy while the teacher trains.
        first = pool.submit(train, teacher)
        waiting = [pool.submit(train, one) for one in students["alone"]]
        first.result()
        for name in METHODS:
            if name != "alone":
                waiting += [pool.submit(train, one) for one in students[name]]
        for done in as_completed([first, *waiting]):
            folder = done.result()
            _, exact, seconds = _read(folder)
            console.print(f"{folder.relative_to(out)}: top-1 {exact:.2%}, {seconds:.0f} s")
            bar()
    # The report compares the first run with the others.
    runs: dict[str, Path] = {}
    for name in reversed(METHODS):
        runs |= {f"{name}/{one.folder.name}": one.folder for one in students[name]}
    page = write_report(
        runs | {"teacher": teacher.folder},
        out / "report.html",
        title=f"{title}: a student alone and by KD, DKD and TAID",
    )
    console.print(_table(title, {"teacher": [teacher], **{METHODS[name]: jobs for name, jobs in students.items()}}))
    console.print(f"report: {page}", soft_wrap=True)
    return page


def train(job: Job) -> Path:
    """Train, evaluate and export a job's model, in a process of the pool; return the run's folder."""
    # Imported here: the process that waits and writes the report does not need it.
    from vlm_distill.config import shipped
    from vlm_distill.config.file import load_config

    from .config import ClassifierConfig

    config = load_config(shipped.FOLDER / "demo" / "vision" / job.config, job.overrides, ClassifierConfig)
    # And here: a mistake in a configuration is reported without waiting for DeepSpeed.
    from vlm_distill.runtime.processes import Processes

    from . import trainer

    processes = Processes(config.training.device)
    try:
        return trainer.train(config, processes)
    finally:
        processes.close()


def prepare(folder: Path) -> tuple[Path, str]:
    """Prepare the data; return its folder and name.

    Fashion-MNIST is read from where Debian's package installs it, or from where an earlier demo unpacked it below
    ``folder``. Otherwise the package is fetched and unpacked there, which needs no rights. If that fails too,
    scikit-learn's digits are written as class folders.

    Args:
        folder: for files that must be written; created if missing.

    Raises:
        UserError: neither is available.
    """
    unpacked = folder / FASHION.relative_to("/")
    for place in (FASHION, unpacked):
        if place.is_dir():
            return place, "Fashion-MNIST"
    folder.mkdir(parents=True, exist_ok=True)
    if _fetch(folder) and unpacked.is_dir():
        return unpacked, "Fashion-MNIST"
    return _write_digits(folder / "digits"), "scikit-learn's digits"


def _fetch(folder: Path) -> bool:
    """Fetch and unpack Debian's package; return whether that worked."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return False
    try:
        for command in (["apt-get", "download", _PACKAGE], ["dpkg-deb", "-x", "", "."]):
            found = sorted(path.name for path in folder.glob(f"{_PACKAGE}_*.deb"))
            filled = [found[-1] if found and not word else word for word in command]
            subprocess.run(filled, cwd=folder, check=True, capture_output=True, timeout=_DOWNLOAD_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _write_digits(folder: Path) -> Path:
    """Write 1,797 images of 8×8 in folders by class, every fifth for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            f"demo: its data are Debian's package {_PACKAGE} or scikit-learn's digits, and neither is here; install "
            "vlm-distill[demo]"
        ) from None
    digits: Any = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("train" if number % 5 else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        # 17 levels of grey, 0 to 16.
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(place / f"{number:04}.png")
    return folder


@contextmanager
def processes(count: int, log: Path) -> Iterator[ProcessPoolExecutor]:
    """Make a pool of processes for :func:`train`, each with its share of the cores and its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, cores() // count)
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (log, threads))
    try:
        yield pool
    except Stopped:
        # Only this process knows of a signal that was sent to it alone.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(log: Path, threads: int) -> None:
    # PyTorch and DeepSpeed read these when they are imported.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Any]:
    """Context manager: show a bar of finished trainings; yield the function that advances it."""
    columns = [TextColumn("trainings"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _read(folder: Path) -> tuple[int, float, float]:
    """Return parameters, top-1 accuracy on the test split, and training seconds of a finished run."""
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    scores = json.loads((folder / "evaluation" / "test" / "student" / "scores.json").read_text("utf-8"))
    return summary["parameters"]["student"], scores["exact"], summary["seconds"]


def _table(title: str, rows: dict[str, list[Job]]) -> Table:
    from vlm_distill.evaluation.seed_statistics import t_interval

    table = Table("", title=f"{title}, test split", title_justify="left")
    for heading in ("parameters", "top-1, mean ± 95 % interval over seeds", "seconds a run"):
        table.add_column(heading, justify="right")
    for name, jobs in rows.items():
        parameters, accuracies, seconds = zip(*(_read(job.folder) for job in jobs), strict=True)
        mean, half = t_interval(accuracies)
        told = f"{mean:.2%}" if half is None else f"{100 * mean:.2f} ± {100 * half:.2f} %"
        table.add_row(name, f"{parameters[0]:,}", told, f"{sum(seconds) / len(seconds):.0f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vision.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-vision"), help="folder of data, runs and report")
    parser.add_argument("--nproc", type=int, default=min(4, cores()), help="trainings at once")
    options = parser.parse_args(arguments)
    return guarded(lambda: run(options.out, options.nproc))


if __name__ == "__main__":
    sys.exit(main())
