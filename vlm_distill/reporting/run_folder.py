"""Read a run's folder for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.errors import UserError
from vlm_distill.config.differences import flattened
from vlm_distill.config.kinds import read_run
from vlm_distill.evaluation.predictions import read_predictions

from .entries import Run


def load_run(folder: Path, label: str, css: str) -> Run:
    """Read a run's folder, or that of an evaluation (``vlm-distill eval``), whose model is taken for a student.

    Missing files are skipped: a run may not have written them yet.

    Raises:
        UserError: the folder is neither, or a file is damaged.
    """
    folder = folder.resolve()
    config, metrics, summary = (folder / name for name in ("config.yaml", "metrics.jsonl", "summary.json"))
    is_run = config.is_file() or metrics.is_file()
    evaluations = folder / "evaluation" if is_run else folder
    # Of language models, an evaluation's folder holds one model's scores: <data>/scores.json.
    found = sorted([*evaluations.glob("*/*/scores.json"), *(() if is_run else folder.glob("*/scores.json"))])
    if not (is_run or found):
        raise UserError(
            f"{folder}: neither a run (no config.yaml, no metrics.jsonl) nor an evaluation (no */scores.json); give a "
            "folder that `vlm-distill train` or `vlm-distill eval` wrote"
        )
    text = _read_text(config) if config.is_file() else ""
    lines = read_metrics(folder)
    settings = flattened(read_run(config)) if text.strip() else {}
    run = Run(
        label=f"{label} (smoke run)" if settings.get("training.smoke") else label,
        css=css,
        folder=folder,
        evaluations_folder=evaluations,
        config=text,
        settings=settings,
        train=[line for line in lines if line.get("kind") == "train"],
        evaluations=[line for line in lines if line.get("kind") == "eval"],
        summary=_read_json(summary) if summary.is_file() else {},
    )
    for scores in found:
        data, *who = scores.parent.relative_to(evaluations).parts
        key = data, *(who or ["student"])
        run.scores[key] = _read_json(scores)
        predictions = scores.with_name("predictions.jsonl")
        run.predictions[key] = read_predictions(predictions) if predictions.is_file() else []
    return run


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``; none without it. Raise ``UserError`` for a damaged line."""
    path = folder / "metrics.jsonl"
    return _read_lines(path) if path.is_file() else []


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); run the command that wrote it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the command that wrote it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; run the command that wrote it again")
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = _read_text(path).splitlines()
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break  # a killed run may leave its last line half-written
            entry = None
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; remove the line or train again") from None
        entries.append(entry)
    return entries
