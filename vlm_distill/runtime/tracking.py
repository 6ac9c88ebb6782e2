"""Metrics of a run: JSON lines, TensorBoard, Weights & Biases on request, and what a display shows of them."""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from data.errors import UserError
from data.saved_json import read_lines
from vlm_distill.config.sections import WandbSection

from . import faults
from .display import Display, Terminal
from .output import cause_of

_WANDB_ID = "wandb_id"


class Tracker:
    """Writes a run's metrics; does nothing on ranks other than the first.

    Args:
        run: the run's folder.
        steps: optimizer steps of the whole run.
        start: steps done by the checkpoint; later lines of ``metrics.jsonl`` are cut off.
        first: whether this is the rank that writes.
        wandb: also log to Weights & Biases, where a resumed run continues as the same one.
        settings: the resolved configuration, for W&B.
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
        wandb: bool | WandbSection,
        settings: Mapping[str, Any],
        display: Display | None = None,
    ) -> None:
        self.first = first
        if not first:
            return
        self._display = Terminal() if display is None else display
        self._shown = run.name, steps, start
        path = run / "metrics.jsonl"
        _cut_back(path, start)
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start or None)
        self._wandb: Any = None
        if wandb:
            self._wandb = _open_wandb(run, WandbSection() if wandb is True else wandb, settings)

    def __enter__(self) -> Self:
        if self.first:
            self._hook, threading.excepthook = threading.excepthook, self._thread_failed
            self._display.open(*self._shown)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.first:
            self._display.close()
            with self._noting():
                self._file.close()
            with self._noting():
                self._board.close()
            threading.excepthook = self._hook
            if self._wandb is not None:
                self._wandb.finish()

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Log metrics after ``step`` finished optimizer steps."""
        if not self.first:
            return
        with self._noting():
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        faults.point("log")
        # Evaluations on several sources get a curve each.
        prefix = f"{kind}/{values['data']}" if "data" in values else kind
        numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        with self._noting():
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

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


def _open_wandb(run: Path, section: WandbSection, settings: Mapping[str, Any]) -> Any:
    """Return W&B's run for this folder, which keeps its id.

    Raises:
        UserError: W&B cannot start, for example without a key or a network.
    """
    import wandb as client

    path = run / _WANDB_ID
    if not path.is_file():
        path.write_text(secrets.token_hex(8))
    given = {"name": run.name} | section.model_dump(exclude_none=True)
    try:
        return client.init(dir=str(run), id=path.read_text(), resume="allow", config=dict(settings), **given)
    except Exception as error:  # its own errors, the network's, the service's
        raise UserError(
            f"training.wandb: {' '.join(str(error).split())[:300]}; log in (wandb login), or set "
            "training.wandb.mode=offline"
        ) from error


def _cut_back(path: Path, start: int) -> None:
    """Drop lines that will be logged again, and a last line that a crash left half-written.

    Those are all lines after step ``start``, and the evaluation of that step, which follows its checkpoint.
    """
    if not path.exists():
        return
    kept = []
    for number, entry in enumerate(read_lines(path), start=1):
        if not isinstance(entry.get("step"), int):
            raise UserError(f"{path}, line {number}: has no step; remove that line, or put the file back")
        if entry["step"] < start + (entry.get("kind") != "eval"):
            kept.append(json.dumps(entry))
    aside = path.with_suffix(".part")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)
