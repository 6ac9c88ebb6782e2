"""Metrics of a run: JSON lines, TensorBoard, the trackers of `training.trackers`, and what a display shows of them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from data.errors import UserError
from data.saved_json import read_lines
from vlm_distill.config.fields import TrackerName
from vlm_distill.config.sections import TrackerSection

from . import faults
from .display import Display, Terminal
from .output import cause_of
from .trackers import Ending, in_one_line, start_trackers


class Tracker:
    """Writes a run's metrics; does nothing on ranks other than the first.

    Args:
        run: the run's folder.
        steps: optimizer steps of the whole run.
        start: steps done by the checkpoint; later lines of ``metrics.jsonl`` are cut off.
        first: whether this is the rank that writes.
        trackers: services that show the run too.
        settings: the resolved configuration, for these.
        display: shows steps and remarks; by default in the terminal.

    Attributes:
        failure: why a metric could not be written, for example on a full disk. Not raised: all ranks must end together.
    """

    failure: str | None = None

    def __init__(
        self,
        run: Path,
        steps: int,
        start: int,
        *,
        first: bool,
        trackers: Sequence[TrackerSection] = (),
        settings: Mapping[str, Any],
        display: Display | None = None,
    ) -> None:
        self.first = first
        if not first:
            return
        self._display = Terminal() if display is None else display
        self._shown = run.name, steps, start
        path = run / "metrics.jsonl"
        self._shown_before = _cut_back(path, start)
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start or None)
        self._trackers = start_trackers(run, trackers, settings)
        self._steps, self._done = steps, start

    def __enter__(self) -> Self:
        if self.first:
            self._hook, threading.excepthook = threading.excepthook, self._thread_failed
            self._display.open(*self._shown)
            for name, tracked in self._trackers.items():
                self._display.say(f"{name} shows the run: {tracked.address}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.first:
            self._display.close()
            with self._noting():
                self._file.close()
            with self._noting():
                self._board.close()
            threading.excepthook = self._hook
            ending = self._ending(kind)
            for name in list(self._trackers):
                with self._going_on_without(name):
                    self._trackers[name].finish(ending)

    def _ending(self, raised: type[BaseException] | None) -> Ending:
        """Return how the run ended, from the exception that ended it. A signal to stop is no failure."""
        if raised is not None and not issubclass(raised, KeyboardInterrupt | SystemExit):
            return "failed"
        return "finished" if raised is None and self._done >= self._steps else "stopped"

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Log metrics after ``step`` finished optimizer steps."""
        if not self.first:
            return
        with self._noting():
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        faults.point("log")
        prefix = _curve(kind, values)
        numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        with self._noting():
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if kind == "train":
            self._done = step
        # What is repeated after a crash was shown before it: the first values stay, as W&B has it anyway.
        if step > self._shown_before.get(prefix, -1):
            for name in list(self._trackers):
                with self._going_on_without(name):
                    self._trackers[name].log(numbers, step)

    def flush(self) -> None:
        """Wait until all metrics are on disk, before the checkpoint of their step."""
        if self.first:
            with self._noting():
                os.fsync(self._file.fileno())
            with self._noting():
                self._board.flush()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or cause_of(error, self._path)

    @contextmanager
    def _going_on_without(self, name: TrackerName) -> Iterator[None]:
        """Go on without a tracker that fails; ``metrics.jsonl`` has what it misses."""
        try:
            yield
        except Exception as error:  # whatever its client raises
            del self._trackers[name]
            self.warn(f"{name} failed, and is not used any more: {in_one_line(error)}; metrics.jsonl has everything")

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's writer thread; its failure is raised again at the next write."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
            self._hook(failed)

    def show(self, step: int, text: str) -> None:
        """Show that ``step`` optimizer steps are finished, with a text beside them."""
        if self.first:
            self._display.show(step, text)

    def say(self, text: str) -> None:
        """Show a remark."""
        if self.first:
            self._display.say(text)

    def warn(self, text: str) -> None:
        """Show a warning."""
        if self.first:
            self._display.warn(text)


def _curve(kind: str, values: Mapping[str, Any]) -> str:
    """Return the name of the curves of a line; evaluations on several sources get a curve each."""
    return f"{kind}/{values['data']}" if "data" in values else kind


def _cut_back(path: Path, start: int) -> dict[str, int]:
    """Drop lines that will be logged again, and a last line that a crash left half-written.

    Those are all lines after step ``start``, and the evaluation of that step, which follows its checkpoint. Return the
    last step of each curve before the cut.
    """
    if not path.exists():
        return {}
    kept = []
    last: dict[str, int] = {}
    for number, entry in enumerate(read_lines(path), start=1):
        if not isinstance(entry.get("step"), int):
            raise UserError(f"{path}, line {number}: has no step; remove that line, or put the file back")
        last[_curve(str(entry.get("kind")), entry)] = entry["step"]
        if entry["step"] < start + (entry.get("kind") != "eval"):
            kept.append(json.dumps(entry))
    aside = path.with_suffix(".part")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)
    return last
