"""Choose what a student keeps of the teacher that it is pruned from, by the run's own data where that decides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Encoded
from data.errors import UserError
from data.saved_json import read_object
from vlm_distill.config.model_sections import CutSection, FromTeacherSection
from vlm_distill.models.importance import Importance
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.plain_layers import PlainStack, find_stack
from vlm_distill.models.pruning import Kept, spaced_layers
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.runtime.output import cause_of
from vlm_distill.runtime.processes import Processes

#: The file in a run's folder that says what the student keeps.
NAME = "from_teacher.json"


def is_measured(cut: CutSection) -> bool:
    """Return whether samples decide what is kept."""
    return cut.by == "influence" or cut.narrows


def choose_kept(
    section: FromTeacherSection,
    teacher: ModelTeacher,
    rows: Iterable[Encoded],
    folder: Path,
    processes: Processes | None,
) -> dict[str, Kept]:
    """Return what the student keeps of its teacher, by part. Collective; the first rank chooses.

    Args:
        section: what the configuration asks for.
        teacher: whole on this rank, or sharded.
        rows: encoded samples to measure the teacher on; the same on all ranks, and read only if needed.
        folder: the run's. The choice is written there; a run with checkpoints is resumed by it, without measuring.
        processes: the ranks; ``None``: the teacher has no weights, and any choice of the right size will do.

    Raises:
        UserError: a size that the teacher cannot be pruned to, or no sample to measure it on.
    """
    unmeasured = _choose(section, teacher.model, {})  # refuses on all ranks what cannot be
    if processes is None or not any(map(is_measured, section.parts.values())):
        return unmeasured
    path = folder / NAME
    known = processes.on_first(lambda: _read(path) if path.is_file() and (folder / "checkpoints").is_dir() else None)
    if known is not None:
        return known
    importance = _measure(section, teacher, rows, processes.device)
    return processes.on_first(lambda: _write(path, _choose(section, teacher.model, importance), importance))


def _measure(
    section: FromTeacherSection, teacher: ModelTeacher, rows: Iterable[Encoded], device: torch.device
) -> dict[str, Importance]:
    """Run the teacher on the rows, one at a time, and measure the parts that are pruned by it."""
    found = {
        part: Importance(find_stack(teacher.model, part), widths=cut.narrows)
        for part, cut in section.parts.items()
        if is_measured(cut)
    }
    with ExitStack() as watched:
        for importance in found.values():
            watched.enter_context(importance.watching())
        for row in rows:
            teacher.run_row(row, device)
    unseen = [part for part, importance in found.items() if not importance.seen]
    if unseen:
        lacking = "has an image" if unseen == ["vision_encoder"] else "can be used"
        raise UserError(
            f"student.from_teacher.calibrate: none of the first {section.calibrate} samples {lacking}, so nothing "
            f"shows what the {unseen[0]} can do without; raise calibrate, or look at the data with vlm-distill inspect"
        )
    return found


def _choose(
    section: FromTeacherSection, model: VisionLanguageModel, importance: Mapping[str, Importance]
) -> dict[str, Kept]:
    kept = {}
    for part, cut in section.parts.items():
        where = "student.from_teacher" if part == "decoder" else f"student.from_teacher.{part}"
        if part == "decoder" or cut != CutSection():
            kept[part] = _Choice(where, cut, find_stack(model, part), importance.get(part)).kept()
    return kept


class _Choice:
    """What is kept of one part.

    Args:
        where: the part's section of the configuration, for errors.
        cut: this section.
        stack: the part's layers.
        importance: what was measured; ``None``: the first neurons, heads and channels will do.
    """

    def __init__(self, where: str, cut: CutSection, stack: PlainStack, importance: Importance | None) -> None:
        self.where, self.cut, self.stack, self.importance = where, cut, stack, importance

    def kept(self) -> Kept:
        """Return the choice. Raise ``UserError`` for a size that the teacher cannot be pruned to."""
        layers = self._layers()
        if not self.cut.narrows:
            return Kept(None if layers == list(range(len(self.stack))) else layers)
        self._check_sizes()
        cut, stack, measured = self.cut, self.stack, self.importance
        neurons = groups = channels = None
        if cut.neurons is not None and cut.neurons < stack.neurons:
            neurons = [_largest(cut.neurons, None if measured is None else measured.neurons(i)) for i in layers]
        if cut.heads is not None and cut.heads < stack.heads:
            count = cut.heads * stack.groups // stack.heads
            groups = [_largest(count, None if measured is None else measured.groups(i)) for i in layers]
        if cut.width is not None and cut.width < stack.width:
            channels = _largest(cut.width, None if measured is None else measured.channels)
        return Kept(None if layers == list(range(len(stack))) else layers, neurons, groups, channels)

    def _layers(self) -> list[int]:
        total, asked = len(self.stack), self.cut.layers
        if asked is None:
            return list(range(total))
        if isinstance(asked, list):
            if asked[-1] >= total:
                raise UserError(f"{self.where}.layers: {asked} must be ascending indices from 0 to {total - 1}")
            return asked
        if asked > total:
            raise UserError(
                f"{self.where}.layers: {asked} layers were asked for, but the {self.stack.part} has {total}; give 1 to "
                f"{total}"
            )
        if self.cut.by == "influence" and self.importance is not None:
            return _largest(asked, torch.tensor(self.importance.layers))
        return spaced_layers(asked, total) if self.cut.by == "spaced" else list(range(asked))

    def _check_sizes(self) -> None:
        stack, cut = self.stack, self.cut
        for name in ("neurons", "heads", "width"):
            asked, there = getattr(cut, name), getattr(stack, name) if getattr(cut, name) else 0
            if asked is not None and asked > there:
                raise UserError(f"{self.where}.{name}: {asked:,} were asked for, but the {stack.part} has {there:,}")
        shared = stack.heads // stack.groups
        if cut.heads is not None and cut.heads % shared:
            raise UserError(
                f"{self.where}.heads: {cut.heads} heads cut a group of {shared} that share keys and values; give a "
                f"multiple of {shared}"
            )


def _largest(count: int, values: Tensor | None) -> list[int]:
    """Return the indices of the ``count`` largest values, ascending; the first ones if nothing was measured."""
    if values is None:
        return list(range(count))
    return sorted(torch.argsort(values, descending=True, stable=True)[:count].tolist())


def _write(path: Path, kept: dict[str, Kept], importance: Mapping[str, Importance]) -> dict[str, Kept]:
    content: dict[str, Any] = {part: asdict(what) for part, what in kept.items()}
    for part, measured in importance.items():
        content[part]["influence"] = measured.layers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output: {cause_of(error, path)}; choose another folder, or make this one writable") from None
    return kept


def _read(path: Path) -> dict[str, Kept]:
    """Return the choice of an earlier start of the same run. Raise ``UserError`` if the file is damaged."""
    content = read_object(path)
    found = {}
    try:
        for part, what in content.items():
            settings = dict(what.items())
            settings.pop("influence", None)
            found[part] = Kept(**settings)
        return found
    except (AttributeError, TypeError):
        raise UserError(
            f"{path}: does not say what the student keeps; delete it to measure the teacher again"
        ) from None


def describe_kept(kept: Mapping[str, Kept], model: VisionLanguageModel, *, which: bool = True) -> str:
    """Say in words what a student keeps: ``decoder: layers 0, 3, 5 of 6, 1,024 of 1,536 neurons``.

    Args:
        kept: by part.
        model: the teacher.
        which: name the layers, not only their number.
    """
    return "; ".join(f"{part}: {_in_words(what, find_stack(model, part), which)}" for part, what in kept.items())


def _in_words(kept: Kept, stack: PlainStack, which: bool) -> str:
    if kept == Kept():
        return "everything"
    found = []
    if kept.layers is not None:
        listed = f"layers {', '.join(map(str, kept.layers))}" if which else f"{len(kept.layers)} layers"
        found.append(f"{listed} of {len(stack)}")
    if kept.neurons is not None:
        found.append(f"{len(kept.neurons[0]):,} of {stack.neurons:,} neurons")
    if kept.groups is not None:
        found.append(f"{len(kept.groups[0]) * stack.heads // stack.groups} of {stack.heads} heads")
    if kept.channels is not None:
        found.append(f"width {len(kept.channels):,} of {stack.width:,}")
    return ", ".join(found)
