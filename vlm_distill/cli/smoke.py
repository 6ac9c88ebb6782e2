"""Smoke runs, ``--smoke``: a few steps of a run on a few rows, to see that all of it works before it is paid for."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from data.errors import UserError
from vlm_distill.config.file import read_saved, save_config
from vlm_distill.runtime.output import claim

T = TypeVar("T", bound=BaseModel)

STEPS = 4
#: Rows that each source has at least, and questions of each evaluation.
ROWS, QUESTIONS = 64, 32
_FILE = "smoke.yaml"


def write_smoke_run(config: Any, path: Path) -> Path:
    """Make the folder of a run's smoke run, and write its configuration there; return that file.

    What an earlier smoke run of the same run has left is removed.

    Args:
        config: the run, of either path.
        path: the run's file, for a comment.

    Raises:
        UserError: the folder holds something else, or another process writes there.
    """
    smoke = smoke_config(config)
    folder = Path(smoke.output)
    _empty(folder)
    about = f"A smoke run of {path}: {STEPS} steps to see that it works. Nothing here is a result."
    save_config(smoke, folder / _FILE, [about])
    return folder / _FILE


def smoke_config(config: T) -> T:
    """Return the configuration of a run's smoke run: its models, losses and batch, but little data and few steps."""
    plain = config.model_dump()
    output = f"{Path(plain['output'])}-smoke"
    plain["output"] = output
    training: dict[str, Any] = {"smoke": True, "steps": STEPS, "epochs": None, "trackers": []}
    training |= {"checkpoint_every": STEPS // 2, "keep_checkpoints": 1}
    plain["training"] |= training

    # A cached teacher knows its data by their number of rows.
    teacher = plain.get("teacher") or {}
    recorded = isinstance(teacher.get("cache"), dict) or plain["student"].get("vision_cache") is not None
    recorded = recorded or any(one.get("cache") for one in (plain.get("teachers") or {}).values())
    if isinstance(teacher.get("cache"), str):
        teacher["cache"] = f"{output}/teacher_cache"  # a classifier's, which is filled while it trains
    if not recorded:
        _limit_rows(plain["data"]["train"], plain["training"]["batch_size"])

    # Evaluate on a few questions, once in the middle if the run evaluates on its way.
    evaluation = plain["evaluation"]
    evaluation["limit"] = min(QUESTIONS, evaluation["limit"] or QUESTIONS)
    if evaluation.get("every") is not None:
        evaluation["every"] = STEPS // 2
    if evaluation.get("every_epochs") is not None:
        evaluation["every_epochs"] = 0.5
    return type(config).model_validate(plain)


def _limit_rows(sources: list[dict[str, Any]], batch_size: int) -> None:
    """Leave each source a few rows, but together enough for whole batches."""
    for source in sources:
        rows = math.ceil(STEPS * batch_size / (len(sources) * source["weight"]))
        wanted = max(ROWS, rows)
        source["limit"] = min(wanted, source["limit"] or wanted)


def is_smoke(folder: Path) -> bool:
    """Return whether a run's folder is that of a smoke run, by its configuration."""
    for name in ("config.yaml", _FILE):
        saved = folder / name
        if saved.is_file():
            settings = read_saved(saved)
            training = settings.get("training") if isinstance(settings, Mapping) else None
            return isinstance(training, Mapping) and training.get("smoke") is True
    return False


def refuse_smoke(folder: Path) -> None:
    """Raise ``UserError`` if a run is a smoke run, whose student is no result."""
    if is_smoke(folder):
        raise UserError(f"{folder}: is a smoke run, whose student is not a result; train without --smoke")


def _empty(folder: Path) -> None:
    """Make a folder for a smoke run, or remove what an earlier one has left there."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    if any(path.name != ".lock" for path in found) and not is_smoke(folder):
        raise UserError(f"--smoke: {folder}: holds something other than a smoke run; move it away")
    with claim(folder):
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
