"""The loop that both paths share: steps, checkpoints, the best student, the end of a run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from data.batch import Problem, Step
from data.errors import UserError
from data.loader import ProblemLog
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.sections import AnyRun
from vlm_distill.losses import Progress, TermSums
from vlm_distill.runtime import faults
from vlm_distill.runtime.display import Display, Terminal
from vlm_distill.runtime.failures import not_finite, out_of_memory, out_of_memory_in_step, peak_memory
from vlm_distill.runtime.launch import Stopped
from vlm_distill.runtime.manifest import Entry
from vlm_distill.runtime.output import cause_of, claim, put_in_place
from vlm_distill.runtime.processes import Processes
from vlm_distill.runtime.stopping import Stopping
from vlm_distill.runtime.trackers import check_installed
from vlm_distill.runtime.tracking import Tracker

from . import checkpoint
from .effects import idle_settings
from .hooks import Hooks
from .intake import FirstSamples, SampleTally, too_many_left_out, try_samples
from .loss_mistakes import loss_mistakes
from .past import Past
from .run_summary import in_words, machine, when, write_summary
from .step_metrics import finite_norm, headline, not_finite_terms, term_means

Means = Mapping[str, Mapping[str, float]]


class Loop(Hooks):
    """A run. A subclass builds its parts in the constructor, and answers the :class:`~.hooks.Hooks`.

    Args:
        config: the run.
        processes: the ranks; every rank builds and runs one loop.
        display: shows the run; by default in the terminal.

    Attributes:
        micro, accumulation: samples of a rank's micro-batch, and micro-batches of a step.
        tally: samples left out, and steps without anything to learn from, over the whole run.

    Raises:
        UserError: the configuration asks for something impossible.
    """

    peak_bytes: int = 0

    def __init__(self, config: AnyRun, processes: Processes, display: Display | None = None) -> None:
        self.settings, self.processes = config, processes
        self.display = Terminal() if display is None else display
        self.folder = Path(config.output)
        self.micro, self.accumulation = split_batch(config, processes.world)
        self._claim = claim(self.folder) if processes.first else None
        if self._claim is not None:
            processes.at_close.callback(self._claim.close)
        self._failure: str | None = None
        self.past = Past(self.folder, config, processes)
        code, owned = config.training.stopped_exit_code, self.display.owns_process
        self.stopping = Stopping(processes.watch, code, owns_process=owned)
        self.problems: ProblemLog | None = None
        self.tally = SampleTally()
        self.began = time.monotonic()
        check_installed(config.training.trackers)

    @classmethod
    def train(cls, config: Any, processes: Processes, *, until: int | None = None) -> Path:
        """Make the trainer of a configuration, and :meth:`run` it; every rank calls this."""
        return cls(config, processes).run(until)

    def run(self, until: int | None = None) -> Path:
        """Train, evaluate and export; return the run's folder.

        Args:
            until: stop with a checkpoint after this many optimizer steps of the whole schedule.

        Raises:
            Stopped: a signal stopped the run, which has written a checkpoint.
            UserError: no sample can be used, or more are left out than ``data.max_bad`` allows.
        """
        try:
            stopped = self._run(until)
        finally:
            self._release()
        if stopped:
            raise Stopped(self.stopping.exit_code(stopped))
        return self.folder

    def _run(self, until: int | None) -> int:
        """Do the work of :meth:`run`; return the signal that stopped it (0: none)."""
        if self.past.finished(self.steps, self.dataset.mixture.sources):
            if self.processes.first:
                self.display.say(
                    f"vlm-distill: {self.folder} is already finished, after {self.steps:,} steps; nothing was changed. "
                    "Raise training.steps or training.epochs to train on"
                )
            return 0

        # Continue from the newest checkpoint, if there is one.
        done, elapsed = self._resume()
        self.past.go_on(done)
        self.began = time.monotonic() - elapsed
        self.best = self.processes.on_first(lambda: self._best_score(done))
        if self.processes.first:
            self.problems = ProblemLog(self.folder / "problems.jsonl")

        with self._tracker(done) as tracker, self.stopping:
            self._greet(tracker, done)
            self._check_first_samples(tracker, done)
            self.introduce(tracker, done)
            if self._evaluates_after(done):
                self._evaluate(done, tracker)
            done, stopped = self._take_steps(tracker, done, min(self.steps, until or self.steps))
            if done == self.steps:
                self._finish(done, tracker)
        return stopped

    def _tracker(self, done: int) -> Tracker:
        settings = self.settings.model_dump(exclude_none=True)
        return Tracker(
            self.folder,
            self.steps,
            done,
            first=self.processes.first,
            trackers=self.settings.training.trackers,
            settings=settings,
            display=self.display,
        )

    def _take_steps(self, tracker: Tracker, done: int, last: int) -> tuple[int, int]:
        """Take the steps after ``done`` up to ``last``. Return the steps done, and the signal to stop (0: none)."""
        self.engine.train()
        self._enter("reading data", done)
        asked = time.monotonic()
        # Processes that read the data end with this block, even if an error's traceback keeps its variables.
        with closing(self.batches(done, last)) as steps:
            for step in steps:
                waited = time.monotonic() - asked
                with self.step_context():
                    values, stop = self.train_step(step, waited)
                done = step.index + 1
                tracker.log("train", done, values)
                tracker.show(done, headline(values, self.speed, self.tally))

                # Save before evaluating: an interrupted evaluation is repeated by the resumed run.
                evaluates = self._evaluates_after(done)
                if evaluates or stop or done == last or done % self.settings.training.checkpoint_every == 0:
                    tracker.flush()
                    self._save(done)
                if stop and done < self.steps:
                    tracker.say(f"stopped after step {done} with a checkpoint; start the run again to continue")
                    return done, stop
                if evaluates:
                    self._evaluate(done, tracker)
                    self.engine.train()

                self._enter("reading data", done)
                self._failure = self._failure or tracker.failure
                asked = time.monotonic()
        return done, 0

    def _release(self) -> None:
        """Let other processes use the folder."""
        if self._claim is not None:
            self._claim.close()

    def _evaluates_after(self, done: int) -> bool:
        return bool(self.evaluate_every and done and done % self.evaluate_every == 0 and done < self.steps)

    def train_step(self, step: Step, waited: float) -> tuple[dict[str, Any], int]:
        """Take an optimizer step over all ranks. Return its metrics, and the signal that a rank has got (0: none)."""
        began = time.monotonic()
        # Dropout depends on seed, step and rank alone, so that a resumed run needs no generator's state.
        self.processes.seed(hash((self.settings.training.seed, step.index, self.processes.rank)) % 2**63)

        # Count the step over all ranks. Problems of the data are counted before answers are drawn on policy.
        left_out = len(step.problems)
        step = self.prepare_step(step)
        totals = self._totals(step, left_out, waited)
        if totals["failed"]:
            self._end_if_failed()
        if totals["problems"]:
            self._record(step)
        rows = {term.name: self.term_rows(term, totals) for term in self.terms}
        self._count(step, totals, empty=not any(rows.values()))

        # Forward, backward, update. A step without rows is skipped: decay and momentum alone would move the weights.
        lr = self.lr(step.index)
        means: Means = {}
        norm: float | None = None
        if any(rows.values()):
            means, norm = self._update(step, rows, lr)
        else:
            self.skip_step(step)

        # Update the losses' own state, such as TAID's t.
        self._update_losses(step, rows, means)

        # Collect the metrics.
        values = self._loss_metrics(step, rows, means)
        if norm is not None:
            values["grad_norm"] = norm
        seconds = waited + time.monotonic() - began
        values |= {"lr": lr, "epoch": (step.index + 1) / self.epoch_steps, "samples": int(totals["samples"])}
        values |= {"left_out": self.tally.share, "empty_steps": self.tally.empty_steps}
        values |= self.step_metrics(totals, seconds)
        values["peak_bytes"] = self._peak()
        values["waiting"] = totals["waited"] / self.processes.world / seconds
        values["seconds"] = time.monotonic() - self.began
        return values, self.stopping.signal_of(totals)

    def _totals(self, step: Step, left_out: int, waited: float) -> dict[str, float]:
        """Return the counts of a step over all ranks, from one all-reduce."""
        counts = self.local_counts(step)
        counts |= {"problems": len(step.problems), "waited": waited, "rows": step.consumed, "left_out": left_out}
        counts |= self.stopping.counts() | {"failed": self._failure is not None}
        return dict(zip(counts, self.processes.sum(list(counts.values())), strict=True))

    def _update_losses(self, step: Step, rows: Mapping[str, float], means: Means) -> None:
        epochs = self.steps / self.epoch_steps
        progress = Progress(step.index, self.steps, step.index / self.epoch_steps, epochs)
        for term in self.terms:
            # A term without rows has no mean; 0 would look perfect.
            known = means[term.name] if rows[term.name] else {}
            term.loss.update({name: value for name, value in known.items() if name != "loss"}, progress)

    def _loss_metrics(self, step: Step, rows: Mapping[str, float], means: Means) -> dict[str, Any]:
        """Return the loss of a step, and by term its means and the loss's own state."""
        values: dict[str, Any] = {}
        if means:
            values["loss"] = sum(
                t.weight * self.weight_factor(t, step.index) * means[t.name]["loss"] for t in self.terms
            )
        for term in self.terms:
            if rows[term.name]:
                both = {**means[term.name], **term.loss.metrics()}
                values |= {f"{term.name}/{name}": value for name, value in both.items()}
        return values

    def _count(self, step: Step, totals: Mapping[str, float], *, empty: bool) -> None:
        """Add a step to the tally. Raise ``UserError`` on all ranks if too much of the data was left out."""
        # Ranks that share sequences count the same rows.
        shared = getattr(self.settings.training, "sequence_parallel", 1)
        self.tally.samples += round(totals["rows"] / shared)
        self.tally.left_out += round(totals["left_out"] / shared)
        self.tally.empty_steps += empty
        limit, last = self.settings.data.max_bad, step.index + 1 == self.steps
        if self.tally.exceeds(limit, self.dataset.mixture.epoch_samples, last=last):
            summary = self.processes.gather(self.problems and self.problems.summary())[0]
            raise too_many_left_out(self.tally, limit, summary)

    def _update(self, step: Step, rows: Mapping[str, float], lr: float) -> tuple[Means, float | None]:
        """Run forward, backward and update of a step that has rows. Return its terms' means and the gradient's norm."""
        # Scale each term so that its gradient is a mean over the whole step on all ranks.
        scales = {}
        for term in self.terms:
            count = rows[term.name]
            scales[term.name] = self.weight_factor(term, step.index) * self.processes.world / count if count else 0.0

        sums: list[dict[str, TermSums]] = []
        norm: float | None = None
        for number, micro in enumerate(step.batches, 1):
            where = f"micro-batch {number} of {len(step.batches)}"
            with self._out_of_memory_explained(micro), loss_mistakes():
                self._enter(f"the forward of {where}", step.index)
                self.engine.begin_micro_batch(last=number == len(step.batches))
                loss, terms = self.forward_batch(step, micro, scales)
                self._enter(f"the backward of {where}", step.index)
                self.engine.backward(loss)
                del loss  # and its graph
                self._enter(f"the update after {where}", step.index)
                norm = self.engine.step(lr)  # only the last micro-batch updates
            sums.append(terms)
        self.after_update(step.index)
        self._enter("adding up the ranks' losses", step.index)
        means = term_means(self.terms, sums, self.processes)
        self._check_finite(step, sums, means, norm)
        return means, norm

    def _end_if_failed(self) -> None:
        """End all ranks if the first could not write its metrics. Collective."""
        reasons = [reason for reason in self.processes.gather(self._failure) if reason is not None]
        if reasons:
            raise UserError(
                f"{reasons[0]}; mend that and start the run again, which continues from its last checkpoint"
            )

    def _note_problems(self, problems: Iterable[Problem]) -> None:
        if self.problems is not None:
            try:
                self.problems.add(problems)
            except OSError as error:
                self._failure = self._failure or cause_of(error, self.folder)

    @contextmanager
    def _out_of_memory_explained(self, micro: Any) -> Iterator[None]:
        """Context manager: say where memory ran out, and what to change, in place of the device's own error."""
        try:
            yield
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
        """Tell the other ranks what this one does in optimizer step ``index``, counted from 0."""
        self.processes.watch.phase(f"step {index + 1}, {phase}")

    def _check_finite(
        self, step: Step, sums: Sequence[Mapping[str, TermSums]], means: Means, norm: float | None
    ) -> None:
        """End a run whose loss or gradient is NaN or infinite, on all ranks, before it is saved."""
        terms = not_finite_terms(means)
        if not terms and finite_norm(norm):
            return
        mine = []
        for number, micro in enumerate(sums):
            if not all(micro[name].loss.isfinite() for name in terms):
                where = self.locate_samples(step, number)
                mine.append(f"rank {self.processes.rank}, micro-batch {number + 1} ({where})")
        found = list(chain.from_iterable(self.processes.gather(mine)))
        raise not_finite(step.index + 1, terms, found, gradient=not terms)

    def _peak(self) -> int:
        """Return this rank's peak memory in bytes: since the last step on a GPU, since its start on the CPU."""
        device = self.processes.device
        peak = peak_memory(device)
        self.peak_bytes = max(self.peak_bytes, peak)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return peak

    def _record(self, step: Step) -> None:
        self._note_problems(chain.from_iterable(self.processes.gather(step.problems)))

    def _save(self, done: int) -> None:
        self.processes.watch.phase(f"writing the checkpoint of step {done}", limited=False)
        self.share_statistics()
        # The losses' own state is part of the task's state dict.
        state = {"step": done, "seconds": time.monotonic() - self.began, "tally": self.tally.state()}

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
        """Load the newest whole checkpoint. Return its steps and the seconds spent up to it, zeros without one."""
        self.past.agree(self.dataset.mixture.sources)
        found = self.past.find(self.lr)
        if found is None:
            return 0, 0.0
        state = self.engine.load(found)
        self.load_more(found)
        self.tally = SampleTally.from_state(state.get("tally", {}))
        return state["step"], state["seconds"]

    def _best_score(self, done: int) -> float | None:
        try:
            return checkpoint.best_score(self.folder / "best", self.compared_by or {}, done)
        except UserError as error:
            self.past.remarks.append(f"the best student so far is damaged, and not compared with: {error}")
            return None

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
        for remark in [*self.remarks, *self.past.remarks, *idle_settings(config)]:
            tracker.warn(remark)
        if done:
            changed = f" with {self.past.changed}" if self.past.changed else ""
            tracker.say(f"resumed after step {done}{changed}")

    def _check_first_samples(self, tracker: Tracker, done: int) -> None:
        """Try the next rows. Raise ``UserError`` on all ranks if none of them can be used. Collective."""
        if done >= self.steps:
            return
        self.processes.watch.phase("trying the first samples", limited=False)
        found = try_samples(self.dataset, done, self.steps) if self.processes.first else FirstSamples()
        found.hint = self.sample_hint
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

    def _evaluate(self, done: int, tracker: Tracker, *, final: bool = False) -> None:
        """Evaluate the student, at the end of the run with its teacher, and keep it if it is the best so far."""
        self.processes.watch.phase(f"the evaluation after step {done}", limited=False)
        with self.stopping.at_once():
            self.share_statistics()
            faults.point("evaluate")
            score, skipped = self.evaluate(done, tracker, final=final)
            self._note_problems(skipped)
            if self.compared_by is not None:
                self._keep_best(done, score, tracker)

    def _keep_best(self, done: int, score: float | None, tracker: Tracker) -> None:
        # Only the first rank has the score, and perhaps the folder.
        better = score is not None and self._beats_best(score)
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

    def _beats_best(self, score: float) -> bool:
        if self.best is None:
            return True
        return score < self.best if self.lower_is_better else score > self.best

    def _finish(self, done: int, tracker: Tracker) -> None:
        if self.tally.empty_steps == self.steps:
            raise UserError(
                f"no step had a usable sample, so nothing was learnt and no student is written: "
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
            tracker.say(in_words(self.settings, self.processes.world, self.peak_bytes))
            if self.problems is not None and self.problems.counts:
                tracker.say(f"{self.problems.summary()}; {self.tally.in_words()} over all steps")
        self.processes.barrier()

    def _summarise(self, trained: float) -> None:
        counts = self.problems.counts if self.problems is not None else {}
        device, world = self.processes.device, self.processes.world
        summary = {
            **when(self.command, world, self.began),
            "seconds": trained - self.began,
            "steps": self.steps,
            **machine(device, world),
            "parameters": self.parameters,
            "memory": {"peak_bytes": max(self.peak_bytes, peak_memory(device))},
            "problems": {f"{source}: {reason}": number for (source, reason), number in counts.items()},
            "rows": self.tally.samples,
            "left_out": self.tally.share,
            "empty_steps": self.tally.empty_steps,
        }
        write_summary(self.folder, summary, self.final_summary())
