"""The loop that both paths share: steps, their numbers, checkpoints, the best student, the end of a run."""

from __future__ import annotations

import datetime
import json
import math
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data.batch import Problem, Step
from data.errors import BadSample, UserError
from data.json_files import read_object
from data.loader import ProblemLog, problem_of
from vlm_distill.config.sections import AnyRun, split_batch
from vlm_distill.losses import FeatureTerm, Progress, Term, TermSums
from vlm_distill.runtime import faults
from vlm_distill.runtime.failures import not_finite, out_of_memory, out_of_memory_in_step, peak_memory
from vlm_distill.runtime.launch import Stopped, cores
from vlm_distill.runtime.manifest import Entry
from vlm_distill.runtime.output import cause_of, claim, put_in_place
from vlm_distill.runtime.stopping import Stopping
from vlm_distill.runtime.tracking import Tracker

from . import checkpoint
from .effects import idle_settings
from .engine import Engine, Processes
from .intake import FIRST_ROWS, FirstRows, Tally, too_many_left_out
from .past import Past


class Loop(ABC):
    """A run. A subclass builds the parts in its constructor, and says what a step learns from and what is evaluated.

    Args:
        config: the run.
        processes: the ranks; every rank builds and runs one.

    Attributes:
        micro, accumulation: samples of a rank's micro-batch, and micro-batches of a step.
        engine, student, terms: what is trained; to be set by the subclass, as is all that follows.
        dataset: of this rank's steps; its ``mixture`` has the sources.
        steps, epoch_steps: optimizer steps of the run and of an epoch, of which there may be a fraction.
        evaluate_every: steps between evaluations; ``None``: only at the end.
        parameters: their numbers, by ``student``, ``trained`` and, where there is one, ``teacher``.
        compared_by: what makes two scores of the student comparable; ``None`` to keep no best student.
        lower_is_better: whether the best student has the lowest of these scores, not the highest.
        told: remarks on what was found while building.
        tally: rows left out, and steps without anything to learn from, of the whole run.

    Raises:
        UserError: the configuration asks for what cannot be.
    """

    #: The command that starts such a run, and the unit of its speed.
    command: ClassVar[str]
    speed: ClassVar[str]

    engine: Engine
    student: nn.Module
    terms: Sequence[Term | FeatureTerm]
    dataset: Any
    steps: int
    epoch_steps: float
    parameters: dict[str, int]
    evaluate_every: int | None = None
    compared_by: Mapping[str, Any] | None = None
    lower_is_better: bool = False
    told: Sequence[str] = ()
    peak_bytes: int = 0

    def __init__(self, config: AnyRun, processes: Processes) -> None:
        self.settings, self.processes = config, processes
        self.folder = Path(config.output)
        self.micro, self.accumulation = split_batch(config, processes.world)
        self._claim = claim(self.folder) if processes.first else None
        self._failure: str | None = None
        self.past = Past(self.folder, config, processes)
        self.stopping = Stopping(processes.watch, config.training.stopped_exit_code)
        self.problems: ProblemLog | None = None
        self.tally = Tally()
        self.began = time.monotonic()
        if config.training.wandb and find_spec("wandb") is None:
            raise UserError("training.wandb: the package wandb is not installed; install vlm-distill[wandb]")

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterator[Step]:
        """This rank's share of the steps ``start`` to ``stop - 1``."""

    def prepare_step(self, step: Step) -> Step:
        """A step as it is learnt, before anything of it is counted; every rank calls it."""
        return step

    @abstractmethod
    def locate_samples(self, step: Step, number: int) -> str:
        """Where the samples of this rank's micro-batch ``number`` of a step stand, for messages."""

    @abstractmethod
    def describe_batch(self, micro: Any) -> str:
        """How large a micro-batch is, in words."""

    @abstractmethod
    def local_counts(self, step: Step) -> dict[str, float]:
        """What of this rank's share is to be summed over ranks before the first forward; ``samples`` among it."""

    @abstractmethod
    def term_rows(self, term: Term | FeatureTerm, totals: Mapping[str, float]) -> float:
        """How many rows a term has in a step of these totals."""

    def warm_up(self, term: Term | FeatureTerm, step: int) -> float:
        """A factor on a term's weight in an optimizer step."""
        return 1.0

    @abstractmethod
    def forward_batch(self, step: Step, micro: Any, scales: Mapping[str, float]) -> tuple[Tensor, dict[str, TermSums]]:
        """The engine's forward of a micro-batch, on whatever device it lies: the loss and its terms."""

    @abstractmethod
    def lr(self, step: int) -> float:
        """The learning rate of an optimizer step."""

    @abstractmethod
    def step_metrics(self, totals: Mapping[str, float], seconds: float) -> dict[str, float]:
        """What is told of a step beside losses and time, its speed under ``speed`` last."""

    @abstractmethod
    def evaluate(self, done: int, tracker: Tracker, *, final: bool) -> tuple[float | None, list[Problem]]:
        """Evaluates the student, at the end with its teacher.

        Returns:
            On the first rank the score by which the best student is chosen, and samples that could not be read.
        """

    @abstractmethod
    def write_student(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Writes the student with these weights; the first rank calls it."""

    def introduce(self, tracker: Tracker, done: int) -> None:
        """Says more about the run before its first step."""

    def mistake_in(self, found: FirstRows) -> str | None:
        """Return why nothing can be learnt from rows that can be used; on the first rank."""
        return None

    def evaluation_mistake(self) -> str | None:
        """Return what the run could not be evaluated on, since nothing of it can be used; on the first rank."""
        return None

    def remarks_on(self, found: FirstRows) -> list[str]:
        """Return what to say about the first rows beside those that are left out; on the first rank."""
        return []

    def skip_step(self, step: Step) -> None:
        """Called in place of an update, for a step in which no rank has anything to learn from."""

    def after_update(self, step: int) -> None:
        """Called after an update of the weights, in optimizer step ``step``, counted from 0."""

    def share_statistics(self) -> None:
        """Makes the ranks' batch-norm statistics one, before they are saved or used."""
        self.engine.share_statistics(self.engine.task)

    def student_state(self) -> dict[str, Tensor]:
        """The student's whole state dict on the CPU, on the first rank; collective."""
        return self.engine.whole_state(self.student)

    def save_more(self, folder: Path) -> None:
        """Writes into a checkpoint what the engine does not know of."""

    def load_more(self, folder: Path) -> None:
        """Restores it."""

    def final_summary(self) -> dict[str, Any]:
        """What ``summary.json`` says beside the rest."""
        return {}

    def run(self, until: int | None = None) -> Path:
        """Trains, evaluates and exports; returns the run's folder.

        Args:
            until: stop (with a checkpoint) after this many optimizer steps of the whole schedule.

        Raises:
            Stopped: the run was told to stop and has written a checkpoint.
            UserError: no sample can be used, or more are left out than ``data.max_bad`` allows.
        """
        config, first = self.settings, self.processes.first
        if self.past.finished(self.steps, self.dataset.mixture.sources):
            self._release()
            return self.folder
        done, elapsed = self._resume()
        last = min(self.steps, until or self.steps)
        self.past.go_on(done)
        if first:
            self.problems = ProblemLog(self.folder / "problems.jsonl")
        self.began = time.monotonic() - elapsed
        self.best = self.processes.on_first(lambda: self._best_score(done))
        settings = config.model_dump(exclude_none=True)
        tracker = Tracker(self.folder, self.steps, done, first=first, wandb=config.training.wandb, settings=settings)
        stopped = 0
        with tracker, self.stopping:
            self._greet(tracker, done)
            self._check_first_rows(tracker, done)
            self.introduce(tracker, done)
            if self._evaluates_after(done):
                self._evaluate(done, tracker)
            self.engine.train()
            self._enter("reading data", done)
            asked = time.monotonic()
            for step in self.batches(done, last):
                waited = time.monotonic() - asked
                values, stop = self.train_step(step, waited)
                done = step.index + 1
                tracker.log("train", done, values)
                tracker.show(done, self._headline(values))
                # Saved before it is evaluated: an evaluation can be broken off, and is made again by the resumed run.
                evaluates = self._evaluates_after(done)
                if evaluates or stop or done == last or done % config.training.checkpoint_every == 0:
                    tracker.flush()
                    self._save(done)
                if stop and done < self.steps:
                    tracker.say(f"stopped after step {done} with a checkpoint; start the run again to go on")
                    stopped = stop
                    break
                if evaluates:
                    self._evaluate(done, tracker)
                    self.engine.train()
                self._enter("reading data", done)
                self._failure = self._failure or tracker.failure
                asked = time.monotonic()
            if done == self.steps:
                self._finish(done, tracker)
        self._release()
        if stopped:
            raise Stopped(self.stopping.exit_code(stopped))
        return self.folder

    def _release(self) -> None:
        """Let other processes have the folder."""
        if self._claim is not None:
            self._claim.close()

    def _evaluates_after(self, done: int) -> bool:
        return bool(self.evaluate_every and done and done % self.evaluate_every == 0 and done < self.steps)

    def train_step(self, step: Step, waited: float) -> tuple[dict[str, Any], int]:
        """Take an optimizer step over all ranks. Return its metrics, and the signal that a rank has got (0: none)."""
        world, began = self.processes.world, time.monotonic()
        # Dropout depends on seed, step and rank alone: a resumed run needs no generator's state.
        self.processes.seed(hash((self.settings.training.seed, step.index, self.processes.rank)) % 2**63)

        # Count the step over all ranks. What of the data was left out is known before anything is drawn on policy.
        left_out = len(step.problems)
        step = self.prepare_step(step)
        counts = self.local_counts(step) | {"problems": len(step.problems), "waited": waited}
        counts |= {"rows": step.consumed, "left_out": left_out}
        counts |= self.stopping.counts() | {"failed": self._failure is not None}
        totals = dict(zip(counts, self.processes.sum(list(counts.values())), strict=True))
        if totals["failed"]:
            self._end_if_failed()
        if totals["problems"]:
            self._record(step)
        rows = {term.name: self.term_rows(term, totals) for term in self.terms}
        self._count(step, totals, empty=not any(rows.values()))

        # Learn. A step in which no rank has anything to learn from is passed over: the optimizer would move the weights
        # by decay and momentum alone.
        lr, values = self.lr(step.index), dict[str, Any]()
        means: dict[str, dict[str, float]] = {}
        if any(rows.values()):
            means, norm = self._update(step, rows, lr)
            values["loss"] = sum(t.weight * self.warm_up(t, step.index) * means[t.name]["loss"] for t in self.terms)
        else:
            self.skip_step(step)
        epochs = self.steps / self.epoch_steps
        for term in self.terms:
            progress = Progress(step.index, self.steps, step.index / self.epoch_steps, epochs)
            # Of no rows there are no means: zeros would pass for a perfect student.
            known = means[term.name] if rows[term.name] else {}
            term.loss.update({k: v for k, v in known.items() if k != "loss"}, progress)

        for term in (term for term in self.terms if rows[term.name]):
            values |= {f"{term.name}/{k}": v for k, v in (means[term.name] | term.loss.metrics()).items()}
        if means and norm is not None:
            values["grad_norm"] = norm
        seconds = waited + time.monotonic() - began
        values = (
            values
            | {"lr": lr, "epoch": (step.index + 1) / self.epoch_steps, "samples": int(totals["samples"])}
            | {"left_out": self.tally.share, "empty_steps": self.tally.empty_steps}
            | self.step_metrics(totals, seconds)
            | {"peak_bytes": self._peak()}
            | {"waiting": totals["waited"] / world / seconds, "seconds": time.monotonic() - self.began}
        )
        return values, self.stopping.signal_of(totals)

    def _count(self, step: Step, totals: Mapping[str, float], *, empty: bool) -> None:
        """Add a step to the tally. Raise ``UserError`` on all ranks where too much of the data was left out."""
        # Ranks that share sequences have the same rows.
        shared = getattr(self.settings.training, "sequence_parallel", 1)
        self.tally.rows += round(totals["rows"] / shared)
        self.tally.left_out += round(totals["left_out"] / shared)
        self.tally.empty_steps += empty
        limit, last = self.settings.data.max_bad, step.index + 1 == self.steps
        if self.tally.exceeds(limit, self.dataset.mixture.epoch_samples, last=last):
            summary = self.processes.gather(self.problems and self.problems.summary())[0]
            raise too_many_left_out(self.tally, limit, summary)

    def _update(
        self, step: Step, rows: Mapping[str, float], lr: float
    ) -> tuple[dict[str, dict[str, float]], float | None]:
        """Run forward, backward and update of a step that has rows. Return its terms' means and the gradient's norm."""
        # Each term's gradient becomes a mean over all its rows on all ranks.
        scales = {}
        for term in self.terms:
            count = rows[term.name]
            scales[term.name] = self.warm_up(term, step.index) * self.processes.world / count if count else 0.0

        sums: list[dict[str, TermSums]] = []
        norm: float | None = None
        for number, micro in enumerate(step.batches, 1):
            terms, norm = self._train_micro_batch(step, number, micro, scales, lr)
            sums.append(terms)
        self.after_update(step.index)
        self._enter("adding up the ranks' losses", step.index)
        means = self._means(sums)
        self._check_finite(step, sums, means, norm)
        return means, norm

    def _end_if_failed(self) -> None:
        """Ends all ranks where the first could not write what it tells; collective."""
        reasons = [reason for reason in self.processes.gather(self._failure) if reason is not None]
        if reasons:
            raise UserError(f"{reasons[0]}; mend that and start the run again, which goes on from its last checkpoint")

    def _note_problems(self, problems: Iterable[Problem]) -> None:
        if self.problems is not None:
            try:
                self.problems.add(problems)
            except OSError as error:
                self._failure = self._failure or cause_of(error, self.folder)

    def _train_micro_batch(
        self, step: Step, number: int, micro: Any, scales: Mapping[str, float], lr: float
    ) -> tuple[dict[str, TermSums], float | None]:
        """Forward, backward and, of the last micro-batch, the update; the terms' sums and the gradient's norm."""
        where = f"micro-batch {number} of {len(step.batches)}"
        try:
            self._enter(f"the forward of {where}", step.index)
            loss, terms = self.forward_batch(step, micro, scales)
            self._enter(f"the backward of {where}", step.index)
            self.engine.backward(loss)
            self._enter(f"the update after {where}", step.index)
            return terms, self.engine.step(lr)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise out_of_memory_in_step(
                error,
                self.settings,
                self.processes.world,
                self.processes.device,
                phase=self.processes.watch.where,
                shape=self.describe_batch(micro),
                recomputes=getattr(self.settings.training, "recompute_logits", True) is False,
            ) from error

    def _enter(self, phase: str, index: int) -> None:
        """Tells the other ranks what this one does in the optimizer step ``index``, counted from 0."""
        self.processes.watch.phase(f"step {index + 1}, {phase}")

    def _check_finite(
        self,
        step: Step,
        sums: Sequence[Mapping[str, TermSums]],
        means: Mapping[str, Mapping[str, float]],
        norm: float | None,
    ) -> None:
        """Ends a run of which a loss or a gradient is infinite or not a number, on all ranks, before it is saved."""
        terms = [name for name, values in means.items() if not math.isfinite(values["loss"])]
        # DeepSpeed tells some infinite norms as -1.
        gradient = norm is not None and not (math.isfinite(norm) and norm >= 0)
        if not terms and not gradient:
            return
        mine = [
            f"rank {self.processes.rank}, micro-batch {number + 1} ({self.locate_samples(step, number)})"
            for number, micro in enumerate(sums)
            if not all(math.isfinite(float(micro[name].loss)) for name in terms)
        ]
        found = [text for part in self.processes.gather(mine) for text in part]
        raise not_finite(step.index + 1, terms, found, gradient=not terms)

    def _peak(self) -> int:
        """This rank's peak memory since the last step, in bytes; what the CPU's processes held is never forgotten."""
        device = self.processes.device
        peak = peak_memory(device)
        self.peak_bytes = max(self.peak_bytes, peak)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return peak

    def _means(self, sums: Sequence[Mapping[str, TermSums]]) -> dict[str, dict[str, float]]:
        """Means of every term's loss and signals over all rows of the step, from one all-reduce."""
        names = {term.name: ["loss", *term.loss.signals] for term in self.terms}
        flat: list[float | Tensor] = []
        for term, keys in names.items():
            flat.append(sum(micro[term].count for micro in sums))
            for key in keys:
                values = [micro[term].loss if key == "loss" else micro[term].signals.get(key, 0.0) for micro in sums]
                # The sum of one would cost a GPU two launches, of which a small model's step has few.
                many = len(values) > 1
                flat.append(sum(v.double() if isinstance(v, Tensor) else v for v in values) if many else values[0])
        totals = iter(self.processes.sum(flat))
        means: dict[str, dict[str, float]] = {}
        for term, keys in names.items():
            count, *added = (next(totals) for _ in ["count", *keys])  # all of them, also where there were no rows
            means[term] = {key: value / count if count else 0.0 for key, value in zip(keys, added, strict=True)}
        return means

    def _record(self, step: Step) -> None:
        gathered = self.processes.gather(step.problems)
        self._note_problems(problem for part in gathered for problem in part)

    def _save(self, done: int) -> None:
        self.processes.watch.phase(f"writing the checkpoint of step {done}", limited=False)
        self.share_statistics()
        # The losses' own state is in the task's state dict, so that it needs no word here.
        state = {"step": done, "seconds": time.monotonic() - self.began, "tally": asdict(self.tally)}

        def write(folder: Path) -> dict[str, Entry]:
            entries = self.engine.save(folder, state)
            self.save_more(folder)
            if self.processes.first:
                self.past.record.write(folder)
            return entries

        checkpoint.save(
            self.folder / "checkpoints",
            done,
            write,
            keep=self.settings.training.keep_checkpoints,
            first=self.processes.first,
            gather=self.processes.gather,
        )

    def _resume(self) -> tuple[int, float]:
        """Load the newest whole checkpoint; return its steps and the seconds spent until it, zeros without one."""
        saved = checkpoint.completed(self.folder / "checkpoints")
        self._agree(saved[-1][1] if saved else None)
        found = self.past.find(self.lr)
        if found is None:
            return 0, 0.0
        state = self.engine.load(found)
        self.load_more(found)
        self.tally = Tally(**state.get("tally", {}))
        return state["step"], state["seconds"]

    def _best_score(self, done: int) -> float | None:
        try:
            return checkpoint.best_score(self.folder / "best", self.compared_by or {}, done)
        except UserError as error:
            self.past.remarks.append(f"the best student so far is damaged, and not compared with: {error}")
            return None

    def _agree(self, latest: Path | None) -> None:
        """Ends a run whose ranks, on machines with disks of their own, see other checkpoints or other data; collective.

        They would go on from other steps, or deal other rows to a step, and learn from both without a word.
        """
        checkpoints = "no checkpoint" if latest is None else latest.name
        rows = {source.name: f"{len(source):,} rows" for source in self.dataset.mixture.sources}
        for rank, (other, theirs) in enumerate(self.processes.gather((checkpoints, rows))):
            if other != checkpoints:
                raise UserError(
                    f"output: {self.folder}: rank {self.processes.rank} finds {checkpoints} there, rank {rank} "
                    f"{other}; all machines must see one and the same folder"
                )
            for name in (name for name in rows if rows[name] != theirs.get(name)):
                raise UserError(
                    f"data: {name}: rank {self.processes.rank} finds {rows[name]}, rank {rank} {theirs.get(name)}; "
                    "every machine needs the same files"
                )

    def _greet(self, tracker: Tracker, done: int) -> None:
        counts, config = self.parameters, self.settings
        share = f" · {counts['student'] / counts['teacher']:.1%} of the teacher" if "teacher" in counts else ""
        tracker.say(
            f"student: {counts['student']:,} parameters, {counts['trained']:,} trained{share} · "
            f"{self.steps:,} steps of {config.training.batch_size} on {self.processes.world} rank(s), "
            f"ZeRO {config.deepspeed.stage}, {config.training.dtype}"
        )
        if counts["student"] > counts.get("teacher", counts["student"]):
            tracker.warn("the student is larger than its teacher")
        for remark in [*self.told, *self.past.remarks, *idle_settings(config)]:
            tracker.warn(remark)
        if done:
            changed = f" with {self.past.changed}" if self.past.changed else ""
            tracker.say(f"resumed after step {done}{changed}")

    def _check_first_rows(self, tracker: Tracker, done: int) -> None:
        """Try the next rows. Raise ``UserError`` on all ranks where none of them can be used; collective."""
        if done >= self.steps:
            return
        self.processes.watch.phase("trying the first rows", limited=False)
        found = self._try_rows(done) if self.processes.first else FirstRows()
        mistake = found.mistake() or self.mistake_in(found)
        if self.processes.first and mistake is None:
            mistake = self.evaluation_mistake()
        mistake = self.processes.gather(mistake)[0]
        if mistake is not None:
            raise UserError(mistake)
        if self.processes.first:
            warning = found.warning()
            for remark in [*([] if warning is None else [warning]), *self.remarks_on(found)]:
                tracker.warn(remark)
            for remark in found.remarks():
                tracker.say(remark)

    def _try_rows(self, done: int) -> FirstRows:
        """Encode the first rows after step ``done``, and return what came of it."""
        found, mixture = FirstRows(), self.dataset.mixture
        rows = chain.from_iterable(mixture.samples_of(step) for step in range(done, self.steps))
        for source, row in islice(rows, min(FIRST_ROWS, mixture.epoch_samples)):
            found.tried += 1
            try:
                images, apart = self.dataset.try_sample((source, row))
            except BadSample as bad:
                found.problems.append(problem_of(mixture.sources[source], row, bad, "skip"))
                continue
            found.images += images
            found.apart += apart
            found.rows_apart += apart > 0
        unread = {source.name: getattr(source, "not_read", None) for source in mixture.sources}
        found.not_read = {name: keys for name, keys in unread.items() if keys}
        return found

    def _headline(self, values: Mapping[str, Any]) -> dict[str, float]:
        """What the bar shows: the loss, the state of its terms, the speed, time waiting for data, and data left out."""
        shown = {"loss": values["loss"]} if "loss" in values else {}
        shown |= {name.split("/")[1]: v for name, v in values.items() if name.endswith("/t")}
        shown |= {
            self.speed.replace("_per_second", "/s"): values[self.speed],
            "waiting %": 100 * values["waiting"],
        }
        if self.tally.left_out:
            shown["left out %"] = 100 * self.tally.share
        if self.tally.empty_steps:
            shown["empty steps"] = self.tally.empty_steps
        return shown

    def _evaluate(self, done: int, tracker: Tracker, *, final: bool = False) -> None:
        """Evaluates the student, at the end of the run with its teacher, and keeps it if it is the best so far."""
        self.processes.watch.phase(f"the evaluation after step {done}", limited=False)
        with self.stopping.at_once():
            self.share_statistics()
            faults.point("evaluate")
            score, skipped = self.evaluate(done, tracker, final=final)
            self._note_problems(skipped)
            if self.compared_by is not None:
                self._keep_best(done, score, tracker)

    def _keep_best(self, done: int, score: float | None, tracker: Tracker) -> None:
        # The first rank alone has the score, and perhaps the folder.
        better = score is not None and (
            self.best is None or (score < self.best if self.lower_is_better else score > self.best)
        )
        if not self.processes.gather(better)[0]:
            return
        state = self.student_state()
        if self.processes.first:
            assert score is not None
            assert self.compared_by is not None
            self.best = score
            about = {"step": done, "score": score, **self.compared_by}
            checkpoint.save_best(self.folder / "best", lambda folder: self.write_student(folder, state), about)
            tracker.say(f"step {done}: the best so far, written to {self.folder / 'best'}")

    def _finish(self, done: int, tracker: Tracker) -> None:
        if self.tally.empty_steps == self.steps:
            raise UserError(
                f"no step had a usable sample, so that nothing was learnt and no student is written: "
                f"{self.processes.gather(self.problems and self.problems.summary())[0]}; mend the data"
            )
        trained = time.monotonic()
        self._evaluate(done, tracker, final=True)
        tracker.flush()
        self._failure = self._failure or tracker.failure
        self._end_if_failed()
        state = self.student_state()
        if self.processes.first:
            put_in_place(self.folder / "student", lambda folder: self.write_student(folder, state), "student")
            self._summarise(trained)
            tracker.say(f"student written to {self.folder / 'student'}")
            if self.problems is not None and self.problems.counts:
                tracker.say(f"{self.problems.summary()}; {self.tally.in_words()} over all steps")
        self.processes.barrier()

    def _summarise(self, trained: float) -> None:
        device = self.processes.device
        counts = self.problems.counts if self.problems is not None else {}
        problems = {f"{source}: {reason}": number for (source, reason), number in counts.items()}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cores()} cores"
        finished = datetime.datetime.now()
        words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
        summary = {
            "command": shlex.join(["vlm-distill", self.command, *words, "--nproc", str(self.processes.world)]),
            "started": (finished - datetime.timedelta(seconds=time.monotonic() - self.began)).isoformat("T", "seconds"),
            "finished": finished.isoformat("T", "seconds"),
            "seconds": trained - self.began,
            "steps": self.steps,
            "device": f"{device.type}: {name}",
            "ranks": self.processes.world,
            "versions": {p: version(p) for p in ("torch", "transformers", "timm", "deepspeed")},
            "parameters": self.parameters,
            "memory": {"peak_bytes": max(self.peak_bytes, peak_memory(device))},
            "problems": problems,
            "rows": self.tally.rows,
            "left_out": self.tally.share,
            "empty_steps": self.tally.empty_steps,
        }
        planned = self.folder / "plan.json"  # where `vlm-distill plan` leaves it
        if planned.is_file():
            with suppress(UserError):  # what became of it is no reason to lose a run's summary
                summary["plan"] = read_object(planned)
        aside = self.folder / "summary.json.part"
        aside.write_text(json.dumps(summary | self.final_summary(), indent=1) + "\n")
        aside.replace(self.folder / "summary.json")
