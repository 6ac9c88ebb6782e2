"""``summary.json``: what a finished run says of itself. It is written last: where it is, the run is complete."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.saved_json import read_object
from vlm_distill.config.sections import AnyRun
from vlm_distill.runtime.launch import cores

NAME = "summary.json"


def when(command: str, world: int, began: float) -> dict[str, Any]:
    """Return the command line that would start this run again, and when the run started and finished.

    Args:
        command: of ``vlm-distill``, such as ``train``.
        world: number of ranks.
        began: the start by ``time.monotonic()``.
    """
    finished = datetime.datetime.now()
    started = finished - datetime.timedelta(seconds=time.monotonic() - began)
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    return {
        "command": shlex.join(["vlm-distill", command, *words, "--nproc", str(world)]),
        "started": started.isoformat("T", "seconds"),
        "finished": finished.isoformat("T", "seconds"),
    }


def machine(device: torch.device, world: int) -> dict[str, Any]:
    """Return the device, the number of ranks, and the versions of the libraries that matter."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cores()} cores"
    return {
        "device": f"{device.type}: {name}",
        "ranks": world,
        "versions": {package: version(package) for package in ("torch", "transformers", "timm", "deepspeed")},
    }


def in_words(config: AnyRun, world: int, peak_bytes: int) -> str:
    """Return the last line of a run: where its student is, or what a smoke run has shown."""
    folder, training = Path(config.output), config.training
    if not training.smoke:
        return f"student written to {folder / 'student'}"
    return (
        f"the smoke run works: {training.steps} steps of {training.batch_size} on {world} rank(s), checkpoints, "
        f"evaluation and the student's files, in at most {peak_bytes / 1e9:.2f} GB a rank. {folder} holds no result; "
        "the next smoke run replaces it"
    )


def write_summary(folder: Path, summary: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Write ``summary.json`` into a run's folder, with its plan if ``vlm-distill plan`` left one there."""
    planned = folder / "plan.json"
    plan: dict[str, Any] = {}
    if planned.is_file():
        with suppress(UserError):  # a damaged plan is no reason to lose the summary
            plan = {"plan": read_object(planned)}
    aside = folder / f"{NAME}.part"
    aside.write_text(json.dumps({**summary, **plan, **more}, indent=1) + "\n")
    aside.replace(folder / NAME)
