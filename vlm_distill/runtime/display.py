"""How a run speaks to a person: in the terminal that started it, or to a Python program that called it."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .console import plain_console

_PLAIN_LINES = 20


class Display(ABC):
    """What is shown of a run, on its first rank. The tracker opens it, shows steps and remarks, and closes it.

    Attributes:
        owns_process: whether the process exists for this run alone, so that the run may end it.
    """

    owns_process: bool = False

    @abstractmethod
    def open(self, name: str, steps: int, done: int) -> None:
        """Start to show a run: how many steps it has, and how many are already done."""

    @abstractmethod
    def close(self) -> None:
        """End what is shown."""

    @abstractmethod
    def show(self, done: int, text: str) -> None:
        """Show how many steps are done, with a text beside them."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Show a remark."""

    @abstractmethod
    def warn(self, text: str) -> None:
        """Show a warning."""


class Terminal(Display):
    """Shows a bar and remarks on standard error; without a terminal, a line now and then."""

    owns_process = True

    def __init__(self) -> None:
        self.console = plain_console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("·"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def open(self, name: str, steps: int, done: int) -> None:
        self._steps = steps
        self._task = self._bar.add_task(name, total=steps, completed=done, values="")
        self._bar.start()

    def close(self) -> None:
        self._bar.stop()

    def show(self, done: int, text: str) -> None:
        self._bar.update(self._task, completed=done, values=text)
        if self._bar.disable and (done % max(1, self._steps // _PLAIN_LINES) == 0 or done == self._steps):
            self._print(f"step {done}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(Text.assemble(("warning:", "bold red"), " ", text))

    def _print(self, text: str | Text) -> None:
        # In a log, a message stays on one line, as it is searched for.
        self.console.print(text, soft_wrap=not self.console.is_terminal)


class Silent(Display):
    """Shows nothing to a program that calls a run; warnings become Python's own."""

    def open(self, name: str, steps: int, done: int) -> None:
        pass

    def close(self) -> None:
        pass

    def show(self, done: int, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        # Not the line of this code, but the package is named: the call that the user wrote is many frames above.
        warnings.warn_explicit(text, UserWarning, "vlm_distill", 0)


class Bar(Silent):
    """Shows a bar of tqdm's: a widget in a notebook that has ipywidgets, else text on standard error."""

    _bar: Any = None

    def open(self, name: str, steps: int, done: int) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=steps, initial=done, desc=name, unit="step")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def say(self, text: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(text, file=sys.stderr)
