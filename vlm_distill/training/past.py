"""The earlier run in the output folder: whether it can be resumed, and the record of what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.digest import Digestible, digest_source
from data.errors import UserError
from data.saved_json import read_object
from vlm_distill.config.file import save_config
from vlm_distill.config.sections import AnyRun
from vlm_distill.runtime import manifest
from vlm_distill.runtime.output import cause_of
from vlm_distill.runtime.processes import Processes

from . import checkpoint
from .resume import Record, compare, compare_data, in_words, steering


class Past:
    """The earlier run in a run's folder. The loop calls the constructor, ``finished``, ``agree``, ``find``, ``go_on``.

    All methods are collective: the first rank looks, and all ranks get the same answer.

    Args:
        folder: the run's.
        config: this run's.
        processes: the ranks.

    Attributes:
        record: this run's record; on the first rank.
        changed: in words, what differs from the checkpoint that this run continues from; may be empty.
        remarks: warnings to print; on the first rank.

    Raises:
        UserError: the folder holds a different run, or one that must not be resumed. Nothing large is read.
    """

    record: Record

    def __init__(self, folder: Path, config: AnyRun, processes: Processes) -> None:
        self.folder, self.config, self.processes = folder, config, processes
        self.changed = ""
        self.remarks: list[str] = []
        self._known: Record | None = None
        processes.on_first(self._compare_settings)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _complete(self) -> bool:
        """Return whether the run in the folder is finished; its summary is written last."""
        if not (self.folder / "student").is_dir():
            return False
        try:
            return bool(read_object(self.folder / "summary.json"))
        except UserError:  # cut off by a crash: the end of the run is repeated
            return False

    def _compare_settings(self) -> None:
        if self._checkpoints.exists() and not self._checkpoints.is_dir():
            raise UserError(
                f"output: {self._checkpoints} is a file, where checkpoints need a folder; move it away, or choose "
                "another output"
            )
        self.record = Record.of(self.config)
        saved = [path for _, path in reversed(checkpoint.completed(self._checkpoints))]
        # A run whose checkpoints were deleted after its end is still finished.
        places = [self.folder, *saved] if self._complete() else saved
        if places and not self.config.training.resume:
            raise UserError(
                f"{self.folder}: holds checkpoints of an earlier run; "
                "set training.resume=true to continue it, or choose another output"
            )
        for place in places:
            try:
                self._known = Record.read(place)
            except UserError:
                continue  # a damaged checkpoint: `find` names it
            self._refuse(compare(self._known, self.config, self.record)[0])
            return

    def _refuse(self, differences: Sequence[str]) -> None:
        """Raise ``UserError`` with the ways out if there are differences."""
        if not differences:
            return
        shown = "; ".join(differences[:4])
        if len(differences) > 4:
            shown += f"; and {len(differences) - 4} more"
        raise UserError(
            f"output: {self.folder} holds a run with other settings: {shown}. Put them back to resume it; or choose "
            "another output, to start afresh or from this run's student "
            f"(student.path={self.folder / 'student'}; `vlm-distill export` writes that of an unfinished run)"
        )

    def finished(self, steps: int, sources: Sequence[Digestible]) -> bool:
        """Return whether nothing is left to do.

        Args:
            steps: optimizer steps of this run.
            sources: its training data.

        Raises:
            UserError: the data differ from those that the run in the folder began with.
        """

        def look() -> bool:
            self.record = self.record.planned(steps, [digest_source(source) for source in sources])
            if self._known is None:
                return False
            self._refuse(compare_data(self._known, self.record))
            return self._complete() and self._known.steps == steps and self._student_is_whole()

        return self.processes.on_first(look)

    def _student_is_whole(self) -> bool:
        """Return whether the finished student is intact; if not, add a remark, or raise if it cannot be rewritten."""
        folder = self.folder / "student"
        if not (folder / manifest.NAME).is_file():  # an earlier version wrote none
            return True
        try:
            manifest.check(folder, manifest.read(folder))
        except manifest.Damaged as error:
            if not checkpoint.completed(self._checkpoints):
                raise UserError(
                    f"{error}; no checkpoint is left to rewrite the student from: put that file back, or choose "
                    "another output"
                ) from None
            self.remarks.append(f"the finished student is damaged and will be rewritten: {error}")
            return False
        return True

    def agree(self, sources: Sequence[Digestible]) -> None:
        """Raise ``UserError`` if the ranks, on machines with disks of their own, see other checkpoints or other data.

        They would continue from different steps, or draw different rows for one step, and nobody would notice.
        """
        saved = checkpoint.completed(self._checkpoints)
        mine = saved[-1][1].name if saved else "no checkpoint"
        rows = {source.name: f"{len(source):,} rows" for source in sources}
        this = self.processes.rank
        for rank, (theirs, their_rows) in enumerate(self.processes.gather((mine, rows))):
            if theirs != mine:
                raise UserError(
                    f"output: {self.folder}: rank {this} finds {mine} there, rank {rank} {theirs}; all machines must "
                    "see one and the same folder"
                )
            for name in rows:
                if rows[name] != their_rows.get(name):
                    raise UserError(
                        f"data: {name}: rank {this} finds {rows[name]}, rank {rank} {their_rows.get(name)}; every "
                        "machine needs the same files"
                    )

    def find(self, lr: Callable[[int], float]) -> Path | None:
        """Return the newest intact checkpoint of this run; ``None`` to start from the beginning.

        Args:
            lr: the learning rate of an optimizer step, counted from 0.

        Raises:
            UserError: no checkpoint is intact, or the newest is beyond the end of this run.
        """
        ranks = self.processes
        found = checkpoint.find(self._checkpoints, rank=ranks.rank, world=ranks.world, gather=ranks.gather)
        if ranks.first:
            checkpoint.clear(self._checkpoints)  # the run may end before it saves again
        if found is None:
            ranks.on_first(self._check_not_complete)
            return None
        ranks.on_first(lambda: self._compare_checkpoint(found, lr))
        return found.path

    def _check_not_complete(self) -> None:
        if self._complete():
            raise UserError(
                f"output: {self.folder} holds a finished run whose checkpoints are gone, so it cannot be made longer; "
                f"choose another output, with student.path={self.folder / 'student'} to start from its student"
            )

    def _compare_checkpoint(self, found: checkpoint.Found, lr: Callable[[int], float]) -> None:
        done, steps = checkpoint.steps_of(found.path), self.record.steps
        before = Record.read(found.path)
        refused, allowed = compare(before, self.config, self.record)
        self._refuse([*refused, *compare_data(before, self.record)])
        if steps < done:
            raise UserError(
                f"training: {steps:,} steps are fewer than the {done:,} of {found.path}; raise training.steps or "
                "training.epochs, or choose another output"
            )
        if before.steps != steps:
            allowed.setdefault("training.steps", [before.steps, steps])
            self._note_stretched_schedule(before.steps, done, lr)
        for path, reason in found.damaged.items():
            self.remarks.append(f"{path.name} is damaged and set aside as {path.name}.damaged: {reason}")
        self.changed = in_words(allowed)
        self._keep(before, done, steering(allowed))
        checkpoint.set_aside(found.damaged)

    def _note_stretched_schedule(self, before: int, done: int, lr: Callable[[int], float]) -> None:
        optimizer: Any = self.config.optimizer
        steps = self.record.steps
        now = f"the learning rate continues at {lr(min(done, steps - 1)):.3g}"
        if optimizer.schedule in ("cosine", "linear"):
            self.remarks.append(
                f"optimizer.schedule: {optimizer.schedule} now spans {steps:,} steps instead of {before:,}: {now}"
            )
        elif 0 < getattr(optimizer, "warmup", 0) < 1:
            self.remarks.append(f"optimizer.warmup: is now a share of {steps:,} steps instead of {before:,}: {now}")

    def _keep(self, before: Record, done: int, changed: Mapping[str, Any]) -> None:
        """Continue the record's list of changes."""
        self.record.changes[:] = before.changes
        if changed:
            self.record.changes.append({"after": done, "changed": changed})

    def go_on(self, done: int) -> None:
        """Write the folder's description of the run, and remove what is no longer true.

        Args:
            done: optimizer steps finished.

        Raises:
            UserError: it cannot be written.
        """

        def write() -> None:
            try:
                (self.folder / "summary.json").unlink(missing_ok=True)
                if not done:
                    (self.folder / "problems.jsonl").unlink(missing_ok=True)
                save_config(self.config, self.folder / "config.yaml", self.record.comments())
                self.record.write(self.folder)
            except OSError as error:
                raise UserError(f"{cause_of(error, self.folder)}; mend that and start the run again") from None

        self.processes.on_first(write)
