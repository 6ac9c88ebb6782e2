"""Distilling a vision-language model: what the shared loop does with image-text data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import DistillationBatch, Problem, Step
from data.collate import Pair
from data.conversation import Document
from data.errors import BadSample
from data.loader import StepDataset, make_loader
from data.mixture import Mixture
from vlm_distill import losses
from vlm_distill.config import RunConfig
from vlm_distill.launch import cores
from vlm_distill.losses import FeatureTerm, Term, TermSums
from vlm_distill.models.initialise import count_parameters
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import ModelTeacher

from .build import (
    build_terms,
    check_packing,
    image_loader,
    load_models,
    open_sources,
    pair_vocabularies,
    prepare_losses,
    trained_parameters,
    turns,
    write_student,
)
from .engine import Engine, Processes, gather_parameters
from .evaluations import Evaluations
from .loop import Loop
from .schedule import learning_rate_factor, lr_scales, parameter_groups
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


class Trainer(Loop):
    """Everything of a run, built in the order in which its mistakes are cheapest to find."""

    command, speed = "train", "tokens_per_second"
    student: VisionLanguageModel

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        self.config = config
        terms = build_terms(config)
        sources = open_sources(config.data.train, config.data.max_length)
        self.evaluations = Evaluations(config, processes)
        self.compared_by = self.evaluations.compared_by if self.evaluations.best is not None else None
        self.lower_is_better = self.evaluations.lower_is_better
        self.told = self.evaluations.told
        self.evaluate_every = config.evaluation.every

        student, self.teacher = load_models(config, processes)
        # A teacher that no loss learns from is only there to be scored beside the student.
        self.guide = self.teacher if any("teacher" in term.loss.needs for term in terms) else None
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
            turns=turns(data),
        )
        self.epoch_steps = self.dataset.mixture.steps_per_epoch
        self.steps = config.training.steps or math.ceil((config.training.epochs or 0) * self.epoch_steps)

        self.parameters = {"student": sum(count_parameters(student).values()), "trained": trained_parameters(student)}
        if self.teacher is not None:
            self.parameters["teacher"] = sum(count_parameters(self.teacher.model).values())
        if processes.device.type == "cuda":
            student.to(processes.device)
        check_packing(config.data.train, student, self.guide.model if self.guide is not None else None, self.grouped)
        self.evaluations.prepare(student, self.teacher)
        task = DistillationTask(student, terms, recompute_logits=config.training.recompute_logits)
        section = config.optimizer
        groups = parameter_groups(task, section.weight_decay, lr_scales(student.parts, section.part_lr, section.lr))
        optimizer = torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps)
        self.engine = Engine(task, optimizer, config, processes, read_parameters=task.read_parameters())
        self.student, self.terms = student, terms
        student.synced = config.deepspeed.stage == 3 and processes.world > 1
        if config.deepspeed.stage == 3:
            student.head.gather = gather_parameters  # for what reads the head outside the task's forward

    def batches(self, start: int, stop: int) -> Iterator[Step]:
        data = self.config.data
        return make_loader(self.dataset, start, stop, workers=min(data.workers, cores()), prefetch=data.prefetch)

    def counts(self, step: Step) -> dict[str, float]:
        samples = sum(batch.samples for batch in step.batches)
        return {**step.counts(), "tokens": step.tokens, "samples": samples}

    def rows(self, term: Term | FeatureTerm, totals: Mapping[str, float]) -> float:
        if isinstance(term, FeatureTerm) and term.loss.unit == "image":
            return totals["images"]
        return totals["distilled"] if "teacher" in term.loss.needs else totals["supervised"]

    def learn(
        self, step: Step, micro: DistillationBatch, scales: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, TermSums]]:
        batch = micro.to(self.processes.device)
        targets = self.guide.outputs(batch, self.features) if self.guide is not None else None
        return self.engine(batch, targets, scales)

    def lr(self, step: int) -> float:
        section = self.config.optimizer
        return section.lr * learning_rate_factor(
            step, self.steps, section.schedule, section.warmup, section.min_lr_ratio
        )

    def values(self, totals: Mapping[str, float], seconds: float) -> dict[str, float]:
        return {"supervised_tokens": int(totals["supervised"]), self.speed: totals["tokens"] / seconds}

    def introduce(self, tracker: Tracker, done: int) -> None:
        checked = self._teacher_loss(self.guide) if self.guide is not None and done < self.steps else None
        if checked is not None:
            loss, limit = checked
            if loss > limit:
                tracker.warn(
                    f"the teacher's own loss on the answers is {loss:.2f} nats a token, hardly "
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
        data, pairs = self.config.data, list[Pair]()
        for source, row in self.dataset.mixture.rows(0)[:_CHECKED_SAMPLES]:
            if not data.train[source].labelled:
                continue
            try:
                sample = self.dataset.mixture.sources[source][row]
                wanted = () if isinstance(sample, Document) else sample.images
                pairs += self.dataset.collator.encode(sample, [self.load_image(image) for image in wanted])
            except BadSample:
                continue
        if not pairs:
            return None
        batch = self.dataset.collator.batch(pairs).to(self.processes.device)
        outputs = teacher.outputs(batch).targets
        loss = losses.CrossEntropy()
        sums = losses.fused_linear(loss, outputs.hidden, outputs.head, None, batch.teacher_targets)
        with outputs.head.weight() as weight:
            limit = _SUSPECT_TEACHER * math.log(len(weight))
        term = sums.terms["loss"]
        return float(term.loss) / max(1, term.count), limit

    def evaluate(self, done: int, tracker: Tracker, *, final: bool) -> tuple[float | None, list[Problem]]:
        return self.evaluations.run(done, tracker, self.began, final=final)

    def write_student(self, folder: Path, state: dict[str, Tensor]) -> None:
        write_student(self.config, self.student, folder, state)

    def final_summary(self) -> dict[str, Any]:
        return {"benchmarks": self.evaluations.scores} if self.evaluations.scores else {}
