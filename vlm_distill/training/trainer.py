"""The trainer: one loop for every loss, model, ZeRO stage and number of ranks."""

from __future__ import annotations

import datetime
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from data.batch import Step
from data.collate import collate, encode_pair
from data.errors import BadSample, UserError
from data.loader import ProblemLog, StepDataset, make_loader
from data.mixture import Mixture
from vlm_distill import losses
from vlm_distill.config import RunConfig, save_config
from vlm_distill.launch import cores
from vlm_distill.losses import FeatureTerm, Progress, TermSums
from vlm_distill.models.initialise import count_parameters
from vlm_distill.models.teacher import ModelTeacher

from . import checkpoint
from .build import (
    build_terms,
    image_loader,
    load_student,
    load_teacher,
    open_sources,
    pair_vocabularies,
    prepare_losses,
    split_batch,
    trained_parameters,
)
from .engine import Engine, Processes, gather_parameters
from .evaluations import Evaluations
from .schedule import learning_rate_factor
from .task import DistillationTask
from .tracking import Tracker

# A teacher whose own loss on the answers is above this share of ln(vocabulary) is hardly better than a guess.
_SUSPECT_TEACHER = 0.5
_CHECKED_SAMPLES = 16


def train(config: RunConfig, processes: Processes, *, until: int | None = None) -> Path:
    """Trains a student, evaluates it and its teacher, and exports it.

    Args:
        config: the run.
        processes: the ranks; every rank calls this.
        until: stop (with a checkpoint) after this many optimizer steps of the whole schedule.

    Returns:
        The run's folder.

    Raises:
        UserError: the configuration asks for what cannot be.
    """
    return Trainer(config, processes).run(until)


class Trainer:
    """Everything of a run, built in the order in which its mistakes are cheapest to find."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.folder = Path(config.output)
        self.micro, self.accumulation = split_batch(config, processes.world)
        if config.training.wandb and find_spec("wandb") is None:
            raise UserError("training.wandb: the package wandb is not installed; install vlm-distill[wandb]")
        terms = build_terms(config)
        sources = open_sources(config.data.train)
        self.evaluations = Evaluations(config, processes)

        self.teacher = load_teacher(config, processes)
        # A teacher that no loss learns from is only there to be scored beside the student.
        self.guide = self.teacher if any("teacher" in term.loss.needs for term in terms) else None
        # After the teacher, so that a student starts from the same weights with and without one.
        torch.manual_seed(config.training.seed)
        student = load_student(config, self.teacher)
        # Where the tokenizers differ, groups of tokens are compared.
        self.grouped = self.teacher is not None and pair_vocabularies(config, student, self.teacher.model, terms)
        prepare_losses(terms, student, self.guide)
        self.features = losses.wanted_features(terms)[1]
        if config.training.activation_checkpointing:
            student.checkpoint_activations()

        data = config.data
        self.load_image = image_loader(data)
        self.dataset = StepDataset(
            Mixture(
                sources,
                [section.weight for section in data.train],
                seed=config.training.seed,
                batch_size=config.training.batch_size,
                window=data.length_window,
            ),
            student.processor,
            self.guide.processor if self.guide is not None else None,
            rank=processes.rank,
            world=processes.world,
            micro_batch_size=self.micro,
            accumulation=self.accumulation,
            max_length=data.max_length,
            roots=[Path(root) for root in data.roots],
            max_pixels=data.max_pixels,
            on_bad=data.bad_samples,
            grouped=self.grouped,
        )
        self.epoch_steps = self.dataset.mixture.steps_per_epoch
        self.steps = config.training.steps or math.ceil((config.training.epochs or 0) * self.epoch_steps)

        self.parameters = {"student": sum(count_parameters(student).values()), "trained": trained_parameters(student)}
        if self.teacher is not None:
            self.parameters["teacher"] = sum(count_parameters(self.teacher.model).values())
        if processes.device.type == "cuda":
            student.to(processes.device)
        task = DistillationTask(student, terms, recompute_logits=config.training.recompute_logits)
        self.engine = Engine(task, config, processes, self.accumulation)
        self.student, self.terms = student, terms
        student.synced = config.deepspeed.stage == 3 and processes.world > 1
        if config.deepspeed.stage == 3:
            student.head.gather = gather_parameters  # for what reads the head outside the task's forward

    def run(self, until: int | None = None) -> Path:
        config, first = self.config, self.processes.first
        self.folder.mkdir(parents=True, exist_ok=True)
        done, elapsed = self._resume()
        last = min(self.steps, until or self.steps)
        if first:
            save_config(config, self.folder / "config.yaml")
        self.problems = ProblemLog(self.folder / "problems.jsonl") if first else None
        self.began = time.time() - elapsed
        self.best = checkpoint.best_score(self.folder / "best", self.evaluations.compared_by, done)
        settings = config.model_dump(exclude_none=True)
        tracker = Tracker(self.folder, self.steps, done, first=first, wandb=config.training.wandb, settings=settings)
        with tracker:
            self._greet(tracker, done)
            workers = min(config.data.workers, cores())
            loader = make_loader(self.dataset, done, last, workers=workers, prefetch=config.data.prefetch)
            for batch in loader:
                values = self._step(batch)
                done = batch.index + 1
                tracker.log("train", done, values)
                tracker.show(done, _headline(values))
                # Evaluated before it is saved: a resumed run has every evaluation of the steps that it does not repeat.
                if config.evaluation.every and done % config.evaluation.every == 0 and done < self.steps:
                    self._evaluate(done, tracker)
                if done == last or done % config.training.checkpoint_every == 0:
                    self._save(done)
            if done == self.steps:
                self._finish(done, tracker)
        return self.folder

    def _step(self, step: Step) -> dict[str, Any]:
        """One optimizer step over all ranks, and what it gave."""
        config, world, began = self.config, self.processes.world, time.time()
        # Dropout depends on seed, step and rank alone: a resumed run needs no generator's state.
        torch.manual_seed(hash((config.training.seed, step.index, self.processes.rank)) % 2**63)
        counts, here = step.counts(), sum(batch.samples for batch in step.batches)
        supervised, distilled, images, tokens, samples, problems = self.processes.sum(
            [counts["supervised"], counts["distilled"], counts["images"], step.tokens, here, len(step.problems)]
        )
        if problems:
            self._record(step)
        rows = {t.name: distilled if "teacher" in t.loss.needs else supervised for t in self.terms}
        rows |= {t.name: images for t in self.terms if isinstance(t, FeatureTerm) and t.loss.unit == "image"}
        scales = {name: world / count if count else 0.0 for name, count in rows.items()}
        lr = config.optimizer.lr * learning_rate_factor(
            step.index, self.steps, config.optimizer.schedule, config.optimizer.warmup, config.optimizer.min_lr_ratio
        )

        self.engine.train()
        sums: list[dict[str, TermSums]] = []
        norm: float | None = None
        for micro in step.batches:
            batch = micro.to(self.processes.device)
            targets = self.guide.outputs(batch, self.features) if self.guide is not None else None
            loss, terms = self.engine(batch, targets, scales)
            self.engine.backward(loss)
            norm = self.engine.step(lr)
            sums.append(terms)
        means = self._means(sums)
        epochs = self.steps / self.epoch_steps
        for term in self.terms:
            progress = Progress(step.index, self.steps, step.index / self.epoch_steps, epochs)
            term.loss.update({k: v for k, v in means[term.name].items() if k != "loss"}, progress)

        values: dict[str, Any] = {"loss": sum(t.weight * means[t.name]["loss"] for t in self.terms)}
        for term in self.terms:
            values |= {f"{term.name}/{k}": v for k, v in (means[term.name] | term.loss.metrics()).items()}
        if norm is not None:
            values["grad_norm"] = norm
        seconds = time.time() - began
        return values | {
            "lr": lr,
            "epoch": (step.index + 1) / self.epoch_steps,
            "samples": int(samples),
            "supervised_tokens": int(supervised),
            "tokens_per_second": tokens / seconds,
            "seconds": time.time() - self.began,
        }

    def _means(self, sums: Sequence[Mapping[str, TermSums]]) -> dict[str, dict[str, float]]:
        """Means of every term's loss and signals over all rows of the step, from one all-reduce."""
        names = {term.name: ["loss", *term.loss.signals] for term in self.terms}
        flat: list[float | Tensor] = []
        for term, keys in names.items():
            flat.append(sum(micro[term].count for micro in sums))
            for key in keys:
                values = [micro[term].loss if key == "loss" else micro[term].signals.get(key, 0.0) for micro in sums]
                flat.append(sum(value.double() if isinstance(value, Tensor) else value for value in values))
        totals = iter(self.processes.sum(flat))
        means: dict[str, dict[str, float]] = {}
        for term, keys in names.items():
            count = next(totals)
            means[term] = {key: next(totals) / count if count else 0.0 for key in keys}
        return means

    def _record(self, step: Step) -> None:
        gathered = self.processes.gather(step.problems)
        if self.problems is not None:
            self.problems.add(problem for part in gathered for problem in part)

    def _save(self, done: int) -> None:
        self.engine.share_statistics()
        # The losses' own state is in the task's state dict, so that it needs no word here.
        state = {"step": done, "seconds": time.time() - self.began}
        checkpoint.save(
            self.folder / "checkpoints",
            done,
            lambda folder: self.engine.save(folder, state),
            keep=self.config.training.keep_checkpoints,
            first=self.processes.first,
            barrier=self.processes.barrier,
        )

    def _resume(self) -> tuple[int, float]:
        """Steps done and seconds spent by the latest checkpoint, which is loaded; zeros without one."""
        found = checkpoint.completed(self.folder / "checkpoints")
        if not found:
            return 0, 0.0
        if not self.config.training.resume:
            raise UserError(
                f"{self.folder}: holds checkpoints of an earlier run; "
                "set training.resume=true to go on, or choose another output"
            )
        state = self.engine.load(found[-1][1])
        return state["step"], state["seconds"]

    def _greet(self, tracker: Tracker, done: int) -> None:
        counts = self.parameters
        share = f" · {counts['student'] / counts['teacher']:.1%} of the teacher" if "teacher" in counts else ""
        tracker.say(
            f"student: {counts['student']:,} parameters, {counts['trained']:,} trained{share} · "
            f"{self.steps:,} steps of {self.config.training.batch_size} on {self.processes.world} rank(s), "
            f"ZeRO {self.config.deepspeed.stage}, {self.config.training.dtype}"
        )
        for warning in self.evaluations.told:
            tracker.say(f"[bold red]warning:[/] {escape(warning)}")
        if done:
            tracker.say(f"resumed after step {done}")
        checked = self._teacher_loss(self.guide) if self.guide is not None and done < self.steps else None
        if checked is not None:
            loss, limit = checked
            if loss > limit:
                tracker.say(
                    f"[bold red]warning:[/] the teacher's own loss on the answers is {loss:.2f} nats a token, hardly "
                    "better than a guess: its chat template, tokenizer or weights do not fit this data; see "
                    "`vlm-distill inspect`"
                )
            else:
                tracker.say(f"the teacher's own loss on the answers: {loss:.3f} nats a token")

    @torch.no_grad()
    def _teacher_loss(self, teacher: ModelTeacher) -> tuple[float, float] | None:
        """The teacher's cross-entropy on the first samples' answers, and the value above which something is wrong.

        ``None`` where none of them has an answer to measure it by.
        """
        data, pairs = self.config.data, []
        for source, row in self.dataset.mixture.rows(0)[:_CHECKED_SAMPLES]:
            if not data.train[source].labelled:
                continue
            try:
                conversation = self.dataset.mixture.sources[source][row]
                images = [self.load_image(image) for image in conversation.images]
                models = self.student.processor, teacher.processor
                pairs.append(encode_pair(conversation, images, *models, data.max_length, grouped=self.grouped))
            except BadSample:
                continue
        if not pairs:
            return None
        batch = collate(pairs, self.student.processor, teacher.processor, grouped=self.grouped)
        batch = batch.to(self.processes.device)
        outputs = teacher.outputs(batch).targets
        loss = losses.CrossEntropy()
        sums = losses.fused_linear(loss, outputs.hidden, outputs.head, None, batch.teacher_targets)
        with outputs.head.weight() as weight:
            limit = _SUSPECT_TEACHER * math.log(len(weight))
        term = sums.terms["loss"]
        return float(term.loss) / max(1, term.count), limit

    def _evaluate(self, done: int, tracker: Tracker, *, final: bool = False) -> None:
        """Evaluates the student, at the end of the run with its teacher, and keeps it if it is the best so far."""
        self.engine.share_statistics()
        teacher = self.teacher.model if self.teacher is not None else None
        score, skipped = self.evaluations.run(self.student, teacher, done, tracker, self.began, final=final)
        if self.problems is not None:
            self.problems.add(skipped)
        if self.evaluations.best is not None:
            self._keep_best(done, score, tracker)

    def _keep_best(self, done: int, score: float | None, tracker: Tracker) -> None:
        # The first rank alone has the score, and perhaps the folder.
        if not self.processes.gather(score is not None and score > self.best)[0]:
            return
        state = self.engine.whole_state(self.student)
        if self.processes.first:
            assert score is not None
            self.best = score
            about = {"step": done, "score": score, **self.evaluations.compared_by}
            checkpoint.save_best(
                self.folder / "best", lambda folder: self.student.save_pretrained(folder, state), about
            )
            tracker.say(f"step {done}: the best so far, written to {self.folder / 'best'}")

    def _finish(self, done: int, tracker: Tracker) -> None:
        trained = time.time()
        self._evaluate(done, tracker, final=True)
        state = self.engine.whole_state(self.student)
        if self.processes.first:
            self.student.save_pretrained(self.folder / "student", state)
            self._summarise(trained)
            tracker.say(f"student written to {self.folder / 'student'}")
            if self.problems is not None and self.problems.counts:
                tracker.say(self.problems.summary())
        self.processes.barrier()

    def _summarise(self, trained: float) -> None:
        device = self.processes.device
        counts = self.problems.counts if self.problems is not None else {}
        problems = {f"{source}: {reason}": number for (source, reason), number in counts.items()}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cores()} cores"
        words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
        summary = {
            "command": shlex.join(["vlm-distill", "train", *words, "--nproc", str(self.processes.world)]),
            "started": datetime.datetime.fromtimestamp(self.began).isoformat(timespec="seconds"),
            "finished": datetime.datetime.now().isoformat(timespec="seconds"),
            "seconds": trained - self.began,
            "steps": self.steps,
            "device": f"{device.type}: {name}",
            "ranks": self.processes.world,
            "versions": {p: version(p) for p in ("torch", "transformers", "deepspeed")},
            "parameters": self.parameters,
            "memory": {"peak_bytes": _peak_memory(device)},
            "problems": problems,
        }
        if self.evaluations.scores:
            summary["benchmarks"] = self.evaluations.scores
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _headline(values: Mapping[str, Any]) -> dict[str, float]:
    """What the bar shows: the loss, the state of its terms and the speed."""
    shown = {"loss": values["loss"]}
    shown |= {name.split("/")[1]: v for name, v in values.items() if name.endswith("/t")}
    return shown | {"tokens/s": values["tokens_per_second"]}


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
