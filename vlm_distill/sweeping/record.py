"""``sweep.json`` in a sweep's folder: which run has which setting, so that its results can be read without its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data.errors import UserError
from data.saved_json import read_object

from .grid import Sweep

NAME = "sweep.json"


@dataclass(frozen=True)
class RecordedRun:
    """A run of a sweep.

    Attributes:
        setting: the names of its choices, by axis, without the seed.
        numbers: the values of those axes that are numbers.
        seed: the run's.
        folder: the run's; equal configurations share one.
    """

    setting: Mapping[str, str]
    numbers: Mapping[str, float]
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Return whether the run is finished."""
        return (self.folder / "summary.json").is_file()


@dataclass(frozen=True)
class SweepRecord:
    """What a sweep compares.

    Attributes:
        title: name of its file.
        output: folder of all runs.
        axes: their names, without the seeds.
        baseline: axis and choice that others are compared with.
        runs: seed by seed.
    """

    title: str
    output: Path
    axes: Sequence[str]
    baseline: tuple[str, str] | None
    runs: Sequence[RecordedRun]


class _SavedRun(BaseModel):
    model_config = ConfigDict(extra="forbid")

    setting: dict[str, str]
    numbers: dict[str, float]
    seed: int
    folder: str


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str
    axes: list[str]
    baseline: tuple[str, str] | None
    runs: list[_SavedRun]


def record_of(sweep: Sweep) -> SweepRecord:
    """Return what a sweep compares, without how it is run."""
    runs = [RecordedRun(run.setting, run.numbers, run.seed, run.folder) for run in sweep.runs]
    return SweepRecord(sweep.path.stem, sweep.output, list(sweep.axes), sweep.baseline, runs)


def write_record(record: SweepRecord) -> None:
    """Write ``sweep.json``; folders are relative to the sweep's, so that it can be moved."""
    runs: list[dict[str, Any]] = []
    for run in record.runs:
        folder = os.path.relpath(run.folder, record.output)
        runs.append({"setting": run.setting, "numbers": run.numbers, "seed": run.seed, "folder": folder})
    plain = {"title": record.title, "axes": list(record.axes), "baseline": record.baseline, "runs": runs}
    record.output.mkdir(parents=True, exist_ok=True)
    aside = record.output / f"{NAME}.part"
    aside.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    aside.replace(record.output / NAME)


def read_record(folder: Path) -> SweepRecord:
    """Return the sweep whose runs are in a folder.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    path = folder / NAME
    try:
        saved = _Saved.model_validate(read_object(path))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: {where} is damaged; run `vlm-distill sweep` again, which repeats no run") from None
    runs = [RecordedRun(run.setting, run.numbers, run.seed, folder / run.folder) for run in saved.runs]
    return SweepRecord(saved.title, folder, saved.axes, saved.baseline, runs)


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is a sweep's."""
    return (folder / NAME).is_file()
