"""Distilling a vision-language model: what the shared loop does with image-text data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import DistillationBatch, Problem, Step
from data.collate import Collator
from data.conversation import Conversation, Document, is_answer
from data.encoding import Pair
from data.errors import BadSample
from data.loader import StepDataset, StepSplit
from data.mixture import Mixture
from data.workers import make_loader
from vlm_distill import losses
from vlm_distill.caching.reading import check_tokens, training_processors
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import FeatureTerm, HiddenTargets, Term, TermSums
from vlm_distill.models.common import DTYPES
from vlm_distill.models.features import SIGHT
from vlm_distill.models.initialise import count_parameters
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.served import ServedTeacher
from vlm_distill.models.shared_vision import sees_as, share
from vlm_distill.models.teacher import CachedTeacher, ModelTeacher, Teacher
from vlm_distill.runtime.launch import cores
from vlm_distill.runtime.tracking import Tracker

from .build import (
    build_terms,
    check_packing,
    divide_sequences,
    image_loader,
    load_models,
    open_sources,
    pair_vocabularies,
    prepare_losses,
    template_remarks,
    trained_parameters,
    turns,
    write_student,
)
from .effects import late_warmup
from .engine import Engine, Processes, gather_parameters
from .evaluations import Evaluations
from .intake import FirstRows
from .loop import Loop
from .on_policy import OnPolicy, check_on_policy, learns_from_drawn
from .operations import Operations
from .packing_plan import plan_packing
from .schedule import learning_rate_factor, lr_scales, parameter_groups
from .task import DistillationTask

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
    dataset: StepDataset

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        self.config = config
        terms = build_terms(config)
        check_on_policy(config, terms)
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
        model = self.teacher.model if isinstance(self.teacher, ModelTeacher) else None
        taught = self.teacher if isinstance(self.teacher, CachedTeacher) else model
        self.grouped = taught is not None and pair_vocabularies(config, student, taught, terms)
        if isinstance(self.teacher, ServedTeacher):
            self.teacher.align(student)
        elif isinstance(self.teacher, CachedTeacher):
            self.told = [*self.told, *check_tokens(config, sources, self.teacher)]
        shown_to = None if self.guide is None else self.guide.processor
        self.told = [*self.told, *template_remarks(config.data, student.processor, shown_to, self.grouped)]
        prepare_losses(terms, student, self.guide)
        self.sequence = processes.share_sequences(config.training.sequence_parallel)
        guide = model if self.guide is not None else None
        if self.sequence is not None:
            divide_sequences(config, self.sequence, student, guide, terms, self.grouped)
        # What both see with, frozen, runs in the teacher alone, which runs in the student's precision.
        self.same_encoder = (
            isinstance(self.guide, ModelTeacher)
            and self.guide.model.dtype == DTYPES[config.training.dtype]
            and sees_as(student, self.guide.model)
        )
        self.shared_vision = self.same_encoder and config.student.vision_cache is None
        self.features = sorted({*losses.wanted_features(terms)[1], *([SIGHT] if self.shared_vision else [])})
        processors, self.seen = training_processors(config, student, self.guide, self.same_encoder)
        if config.training.activation_checkpointing:
            student.checkpoint_activations()

        data = config.data
        if processes.device.type == "cuda":
            student.to(processes.device)
        packing = plan_packing(data, student, guide)
        self.told = [*self.told, *packing.told]
        self.load_image = image_loader(data)
        self.dataset = StepDataset(
            Mixture(
                sources,
                [section.weight for section in data.train],
                seed=config.training.seed,
                batch_size=config.training.batch_size,
                window=packing.window,
                longest_first=True,
            ),
            Collator(*processors, data.max_length, turns(data), self.grouped, packing.packed),
            StepSplit(
                self.micro,
                self.accumulation,
                rank=processes.rank // config.training.sequence_parallel,
                world=processes.world // config.training.sequence_parallel,
            ),
            load=self.load_image,
            on_bad=data.bad_samples,
            keep_conversations=self.guide is not None and self.guide.needs_images,
        )
        self.epoch_steps = self.dataset.mixture.steps_per_epoch
        self.steps = config.training.steps or math.ceil((config.training.epochs or 0) * self.epoch_steps)
        warmup = config.optimizer.warmup  # below 1 a share of the run
        self.told = [*self.told, *late_warmup("optimizer.warmup", warmup, max(1, self.steps), "steps")]

        self.parameters = {"student": sum(count_parameters(student).values()), "trained": trained_parameters(student)}
        if isinstance(self.teacher, CachedTeacher):
            self.parameters["teacher"] = self.teacher.parameters
        elif model is not None:
            self.parameters["teacher"] = sum(count_parameters(model).values())
        self.operations = Operations(
            student,
            guide,
            processes.device,
            bf16=config.training.dtype == "bf16",
            shared_vision=self.shared_vision,
            head=self.guide.head if isinstance(self.guide, CachedTeacher) else None,
        )
        check_packing(config.data.train, student, guide, self.grouped)
        self.evaluations.prepare(student, self.teacher if isinstance(self.teacher, ModelTeacher) else None)
        task = DistillationTask(
            student,
            terms,
            recompute_logits=config.training.recompute_logits,
            sequence=self.sequence,
            shared_vision=self.shared_vision,
        )
        section = config.optimizer
        optimizer = torch.optim.AdamW(
            parameter_groups(task, section.weight_decay, lr_scales(student.parts, section.part_lr, section.lr)),
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            fused=config.deepspeed.offloads_optimizer or None,
        )
        self.engine = Engine(task, optimizer, config, processes, read_parameters=task.read_parameters())
        if self.same_encoder and config.deepspeed.stage < 3:
            assert isinstance(self.guide, ModelTeacher)
            share(student, self.guide.model)
        self.student, self.terms = student, terms
        student.synced = config.deepspeed.stage == 3 and processes.world > 1
        if config.deepspeed.stage == 3:
            student.head.gather = gather_parameters  # for what reads the head outside the task's forward
        self.on_policy: OnPolicy | None = None
        if config.on_policy is not None:
            assert self.guide is not None
            rest = self.load_image, processes, self.steps, self.lower_is_better
            self.on_policy = OnPolicy(config, self.dataset, student, self.guide, *rest)

    def train_step(self, step: Step, waited: float) -> tuple[dict[str, Any], int]:
        with nullcontext() if self.sequence is None else self.sequence.shared():
            return super().train_step(step, waited)

    def batches(self, start: int, stop: int) -> Iterator[Step]:
        data = self.config.data
        steps = make_loader(self.dataset, start, stop, workers=min(data.workers, cores()), prefetch=data.prefetch)
        if isinstance(self.guide, ServedTeacher) and self.on_policy is None:
            return self.guide.asked_ahead(steps)
        return steps

    def locate_samples(self, step: Step, number: int) -> str:
        return self.dataset.locate_samples(step.index, number)

    def describe_batch(self, micro: DistillationBatch) -> str:
        rows, tokens = micro.student.inputs["input_ids"].shape
        return f"{rows} rows × {tokens} tokens with {micro.images} images"

    def prepare_step(self, step: Step) -> Step:
        if self.on_policy is None:
            return step
        taken = self.on_policy.prepare_step(step)
        if isinstance(self.guide, ServedTeacher):
            for batch in taken.batches:
                self.guide.ask(batch)
        return taken

    def local_counts(self, step: Step) -> dict[str, float]:
        samples = sum(batch.samples for batch in step.batches)
        sides = [rows for batch in step.batches for rows in (batch.student, batch.teacher) if rows is not None]
        counts = {
            **step.counts(),
            "tokens": step.tokens,
            "samples": samples,
            "filled": sum(rows.tokens for rows in sides),
            "places": sum(rows.inputs["input_ids"].numel() for rows in sides),
            "flops": sum(self.operations.of(batch) for batch in step.batches),
            **({} if self.on_policy is None else self.on_policy.counted),
        }
        if self.sequence is not None and self.sequence.rank:
            return dict.fromkeys(counts, 0)  # the first of those that share the samples counts them
        return counts

    def term_rows(self, term: Term | FeatureTerm, totals: Mapping[str, float]) -> float:
        if totals.get("on_policy") and not learns_from_drawn(term):
            return 0.0
        if isinstance(term, FeatureTerm) and term.loss.unit == "image":
            return totals["images"]
        return totals["distilled"] if "teacher" in term.loss.needs else totals["supervised"]

    def forward_batch(
        self, step: Step, micro: DistillationBatch, scales: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, TermSums]]:
        batch = micro.to(self.processes.device)
        targets = self.guide.outputs(batch, self.features) if self.guide is not None else None
        return self.engine(batch, targets, scales)

    def skip_step(self, step: Step) -> None:
        if isinstance(self.guide, ServedTeacher):
            for batch in step.batches:
                self.guide.forget(batch)

    def lr(self, step: int) -> float:
        section = self.config.optimizer
        return section.lr * learning_rate_factor(
            step, self.steps, section.schedule, section.warmup, section.min_lr_ratio
        )

    def step_metrics(self, totals: Mapping[str, float], seconds: float) -> dict[str, float]:
        return {
            "supervised_tokens": int(totals["supervised"]),
            "padding": 1 - totals["filled"] / totals["places"],
            **self.operations.metrics(totals["flops"], seconds, self.processes.world),
            **({} if self.on_policy is None else self.on_policy.metrics(totals, seconds)),
            self.speed: totals["tokens"] / seconds,
        }

    def mistake_in(self, found: FirstRows) -> str | None:
        section = self.config.student
        trained = {*section.trained_whole, *([] if section.lora is None else section.lora.parts)}
        if found.images or "decoder" in trained or not self.student.processor.has_vision:
            return None
        return (
            f"student.train: only {' and '.join(sorted(trained))} would train, and none of the first {found.tried} "
            "rows has an image, so that nothing would be learnt; train the decoder too, or use data with images"
        )

    def evaluation_mistake(self) -> str | None:
        return self.evaluations.mistake()

    def remarks_on(self, found: FirstRows) -> list[str]:
        remarks = []
        if not found.images and self.student.processor.has_vision:
            remarks.append(f"the student has a vision encoder, and none of the first {found.tried} rows has an image")
        together = self.config.data.turns == "together" and not self.student.processor.frame.earlier
        if together and self._several_answers(found.tried):
            remarks.append(
                "the student's template shows an answer differently once another question follows; data.turns: split "
                "trains each answer of a conversation as it is generated"
            )
        return remarks

    def _several_answers(self, rows: int) -> bool:
        """Whether one of the first rows is a conversation of several answers."""
        mixture = self.dataset.mixture
        first = chain.from_iterable(mixture.samples_of(step) for step in range(self.steps))
        for source, row in islice(first, rows):
            try:
                sample = mixture.sources[source][row]
            except BadSample:
                continue
            if isinstance(sample, Conversation) and sum(map(is_answer, sample.messages)) > 1:
                return True
        return False

    def introduce(self, tracker: Tracker, done: int) -> None:
        if self.shared_vision:
            tracker.say("the vision encoder is frozen and the teacher's: it runs once, for both")
        if self.seen is not None:
            tracker.say(self.seen)
        told = isinstance(self.guide, ModelTeacher | CachedTeacher) and done < self.steps
        checked = self._teacher_loss(self.guide) if self.guide is not None and told else None
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
    def _teacher_loss(self, teacher: Teacher) -> tuple[float, float] | None:
        """The teacher's cross-entropy on the first samples' answers, and the value above which something is wrong.

        ``None`` where none of them has an answer to measure it by, or only likeliest tokens are known.
        """
        data, pairs = self.config.data, list[Pair]()
        for source, row in self.dataset.mixture.samples_of(0)[:_CHECKED_SAMPLES]:
            if not data.train[source].labelled:
                continue
            try:
                sample = self.dataset.mixture.sources[source][row]
                wanted = () if isinstance(sample, Document) else sample.images
                images = [self.load_image(image) for image in wanted]
                pairs += self.dataset.collator.encode(sample, images, (source, row))
            except BadSample:
                continue
        if not pairs:
            return None
        batch = self.dataset.collator.batch(pairs).to(self.processes.device)
        outputs = teacher.outputs(batch).targets
        if not isinstance(outputs, HiddenTargets):
            return None
        loss = losses.CrossEntropy()
        sums = losses.fused_linear(loss, outputs.hidden, outputs.head, None, batch.teacher_targets)
        with outputs.head.weight() as weight:
            limit = _SUSPECT_TEACHER * math.log(len(weight))
        term = sums.terms["loss"]
        return float(term.loss) / max(1, term.count), limit

    def evaluate(self, done: int, tracker: Tracker, *, final: bool) -> tuple[float | None, list[Problem]]:
        score, problems = self.evaluations.run(done, tracker, self.began, final=final)
        if self.on_policy is not None:
            self.on_policy.evaluated(score)
        return score, problems

    def save_more(self, folder: Path) -> None:
        if self.on_policy is not None:
            self.on_policy.save(folder)

    def load_more(self, folder: Path) -> None:
        if self.on_policy is not None:
            self.on_policy.restore(folder)

    def write_student(self, folder: Path, state: dict[str, Tensor]) -> None:
        write_student(self.config, self.student, folder, state)

    def final_summary(self) -> dict[str, Any]:
        return {"benchmarks": self.evaluations.scores} if self.evaluations.scores else {}
