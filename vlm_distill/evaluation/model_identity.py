"""Which model answers: the folder to load, and what tells its answers from another model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.errors import UserError
from vlm_distill.models.fingerprint import fingerprint

from .kept_answers import digest_of


def student_of(given: str) -> str:
    """Return the student's folder if ``given`` is the folder of a run, and ``given`` itself otherwise.

    Raises:
        UserError: the run has no student yet.
    """
    run = Path(given)
    if (run / "student").is_dir():
        return str(run / "student")
    if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
        raise UserError(f"{given}: this run has no student yet; let it finish, or `vlm-distill export {given} FOLDER`")
    return given


def identity(name: str, model: Any = None) -> dict[str, Any]:
    """Return what a model's answers depend on: its files and, once loaded, its precision and chat template."""
    found: dict[str, Any] = {"files": fingerprint(name) or name}
    if model is not None:
        found["dtype"] = str(model.dtype).removeprefix("torch.")
        # The template includes its arguments.
        found["chat_template"] = digest_of(model.processor.chat_template)
    return found
