"""Distillation as one call: ``vlm_distill.distill``."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.errors import UserError
from data.saved_json import read_lines
from vlm_distill.config.file import check_values, explain
from vlm_distill.config.sections import RunConfig
from vlm_distill.models import VisionLanguageModel, load_vlm
from vlm_distill.runtime.display import Bar, Display, Silent
from vlm_distill.runtime.failures import explain as explain_failure
from vlm_distill.runtime.launch import Stopped
from vlm_distill.runtime.processes import Processes

from .arguments import Arguments, is_dataset, plain
from .surroundings import undisturbed

#: A path, a list of samples, a ``datasets.Dataset``, or several of these.
AnyData = Any
#: A name or folder, a model from ``load_vlm``, or a model of Transformers with its processor.
AnyModel = str | os.PathLike[str] | VisionLanguageModel | tuple[Any, Any] | Mapping[str, Any]


class DistilledRun:
    """A finished run.

    Attributes:
        folder: everything that the run wrote, as ``vlm-distill train`` writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"DistilledRun({str(self.folder)!r})"

    @cached_property
    def student(self) -> VisionLanguageModel:
        """The trained student, loaded from the folder onto the CPU when it is first asked for."""
        return load_vlm(self.folder / "student").eval()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics: an entry of kind ``train`` for each step, and of kind ``eval`` for each evaluation."""
        return read_lines(self.folder / "metrics.jsonl")

    def report(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Write the report, one HTML page, and return its path.

        Args:
            out: the file; by default ``report.html`` in the folder.
        """
        from vlm_distill.reporting.report import write_report

        return write_report([self.folder], None if out is None else Path(out))


def distill(
    *,
    student: AnyModel,
    data: AnyData,
    output: str | os.PathLike[str],
    teacher: AnyModel | None = None,
    loss: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = "taid",
    steps: int | None = None,
    progress: bool = False,
    **sections: Any,
) -> DistilledRun:
    """Distil a student, and return the finished run.

    The arguments stand for a configuration of ``vlm-distill train``: each may hold what the section of its name holds.
    Models and samples may be in memory. They are left as they are: the student that trains is a copy.

    The same call, made again, returns the finished run; after an interruption (Ctrl-C finishes the step and writes a
    checkpoint) it continues. In a program that torchrun has started, every rank makes the call.

    Args:
        student: a name or folder; a model from ``load_vlm``; a loaded model of Transformers with its processor, as
            ``(model, processor)``, or with its tokenizer for a language model; or a section, whose ``path`` may be any
            of these: ``{"path": (model, processor), "lora": {"rank": 8}}``.
        data: a path; a list of samples (dicts in any layout that files may have; images may be Pillow's);
            a ``datasets.Dataset``; a list of such sources; or a section with these under ``train`` and ``eval``.
        output: the run's folder. Call it with another folder to start afresh.
        teacher: as ``student``; optional for losses that need none. A loaded one is used in its own precision, without
            a copy.
        loss: a name, a term with parameters as ``{"name": "taid", "t_start": 0.4}``, or a list of terms.
        steps: optimizer steps; or leave it out and give ``training={"epochs": 1}``.
        progress: show a progress bar and remarks.
        sections: further sections: ``training``, ``optimizer``, ``evaluation``, ``deepspeed``, ``on_policy``,
            ``teachers``.

    Raises:
        UserError: a mistake in the arguments, models or data, or a run that cannot continue; the message is one line.
        KeyboardInterrupt: Ctrl-C was pressed; a checkpoint is written unless it was pressed twice.
    """
    with Arguments() as arguments:
        terms = [loss] if isinstance(loss, str | Mapping) else loss
        given = {
            **_sections(arguments, sections),
            "student": arguments.model("student", student, trained=True),
            "loss": [{"name": term} if isinstance(term, str) else plain(term) for term in terms],
            "data": _data(arguments, data),
            "output": os.fspath(output),
        }
        if teacher is not None:
            given["teacher"] = arguments.model("teacher", teacher)
        if steps is not None:
            given["training"] = {**given["training"], "steps": steps}
        config = _validated(given)
        with undisturbed(config.training.device):
            _train(config, Bar() if progress else Silent())
    return DistilledRun(Path(config.output))


def _sections(arguments: Arguments, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the further sections as plain values."""
    found = {"training": {}, **plain({name: value for name, value in sections.items() if name != "teachers"})}
    if "teachers" in sections:
        found["teachers"] = {name: arguments.model(name, model) for name, model in sections["teachers"].items()}
    return found


def _data(arguments: Arguments, given: AnyData) -> dict[str, Any]:
    """Return the section ``data``."""
    whole = not is_dataset("data", given) and isinstance(given, Mapping) and "train" in given
    section = dict(given) if whole else {"train": given}
    for key, name in (("train", "data"), ("eval", "eval")):
        if key in section:
            section[key] = arguments.sources(name, section[key])
    return plain(section)


def _validated(given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration. Raise ``UserError`` if it is none, or holds a secret."""
    check_values(given, "distill")
    try:
        config = RunConfig.model_validate(given)
    except ValidationError as error:
        raise UserError(explain(error, RunConfig)) from None
    lora, path = config.student.lora, config.student.path
    if lora is not None and not lora.merge and path == "memory:student":
        raise UserError(
            "student.lora.merge: an adapter refers to a base on disk, and this student is in memory; give its name or "
            "folder, or leave merge out"
        )
    return config


def _train(config: RunConfig, display: Display) -> None:
    """Train in this process."""
    # Imported late: DeepSpeed chooses its accelerator when it is imported, and takes seconds.
    from vlm_distill.trainer import Trainer

    processes = Processes(config.training.device, config.training.timeout)
    try:
        Trainer(config, processes, display).run()
    except Stopped:
        raise KeyboardInterrupt("stopped with a checkpoint; make the same call again to continue") from None
    except Exception as error:
        failure = explain_failure(error, processes.watch.where, processes.device)
        if failure is None or isinstance(error, UserError):
            raise
        raise UserError(str(failure)) from None
    finally:
        processes.close()
        gc.collect()  # the engine's objects refer to each other in circles
