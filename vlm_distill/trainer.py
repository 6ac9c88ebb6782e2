"""Trainer: distillation of a vision-language model on image-text data, on the loop that classifiers use too."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import DistillationBatch, Problem, Step
from data.conversation import Conversation, is_answer
from data.encoding import Pair
from data.errors import BadSample
from data.loader import StepDataset
from data.sample_images import load_images
from data.workers import make_loader
from vlm_distill import losses
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import FeatureTerm, HiddenTargets, Term, TermSums, must_be_alike
from vlm_distill.models.common import count_parameters
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.shared_vision import share_vision_weights
from vlm_distill.models.teacher import Teacher
from vlm_distill.run import Run
from vlm_distill.runtime.display import Display
from vlm_distill.runtime.launch import cores
from vlm_distill.runtime.processes import Processes
from vlm_distill.runtime.tracking import Tracker
from vlm_distill.training.effects import late_warmup
from vlm_distill.training.engine import Engine, gather_parameters
from vlm_distill.training.evaluations import Evaluations
from vlm_distill.training.flops import StepFlops
from vlm_distill.training.importance_weights import ImportanceWeights
from vlm_distill.training.intake import FirstSamples
from vlm_distill.training.loading import trained_parameters, write_student
from vlm_distill.training.loop import Loop
from vlm_distill.training.on_policy import OnPolicy
from vlm_distill.training.optimizers import build_optimizer
from vlm_distill.training.rollouts import Rollouts
from vlm_distill.training.schedule import learning_rate_factor, lr_scales
from vlm_distill.training.student_cut import describe_kept
from vlm_distill.training.task import DistillationTask
from vlm_distill.training.teacher_shares import TeacherShares
from vlm_distill.training.terms import acts_on, unit_of

# A teacher whose own loss on the answers is above this share of ln(vocabulary) is hardly better than a guess.
_SUSPECT_TEACHER = 0.5
_CHECKED_SAMPLES = 16


class Trainer(Loop):
    """Trains a student on image-text data. Whatever is cheap to check is checked before a model is loaded."""

    command, speed = "train", "tokens_per_second"
    sample_hint = " (`vlm-distill inspect` shows every sample)"
    student: VisionLanguageModel
    dataset: StepDataset

    def __init__(self, config: RunConfig, processes: Processes, display: Display | None = None) -> None:
        super().__init__(config, processes, display)
        self.config, self.parts = config, Run(config, processes)
        parts = self.parts

        # Open data and benchmarks before anything is loaded.
        self.terms, self.sources = parts.terms, parts.sources
        self.evaluations = Evaluations(config, processes)
        self.compared_by = self.evaluations.compared_by if self.evaluations.best is not None else None
        self.lower_is_better = self.evaluations.lower_is_better
        self.evaluate_every = config.evaluation.every

        # Load the models.
        parts.prepare()
        self.student, self.teacher, self.loss_teacher = parts.student, parts.teacher, parts.loss_teacher
        self.sequence, self.shared_vision, self.features = parts.sequence, parts.shared_vision, parts.teacher_features

        # Find the length of the run.
        self.dataset = parts.dataset
        self.epoch_steps = self.dataset.mixture.steps_per_epoch
        self.steps = config.training.steps or math.ceil((config.training.epochs or 0) * self.epoch_steps)
        warmup = late_warmup("optimizer.warmup", config.optimizer.warmup, max(1, self.steps), "steps")
        self.remarks = [*self.evaluations.remarks, *parts.remarks, *warmup]

        # Count parameters and operations while the models are whole.
        self.parameters = self._count_parameters()
        self.flops = self._step_flops()
        self.evaluations.prepare(self.student, self.teacher)
        importance = None if config.on_policy is None else config.on_policy.importance
        self.importance = None if importance is None else ImportanceWeights(importance, processes)
        self.engine = self._start_engine()
        self.teacher_shares = TeacherShares(config, self.terms, processes)
        self.on_policy = self._open_on_policy()

    def _count_parameters(self) -> dict[str, int]:
        """Return the numbers of parameters."""
        whole = sum(count_parameters(self.student.parts).values())
        counts = {"student": whole, "trained": trained_parameters(self.student)}
        if self.teacher is not None and self.teacher.parameters is not None:
            counts["teacher"] = self.teacher.parameters
        return counts

    def _step_flops(self) -> StepFlops:
        """Return the counter of a step's operations."""
        teacher, running = self.loss_teacher, self.parts.running_teacher
        return StepFlops(
            self.student,
            running,
            self.processes.device,
            bf16=self.config.training.dtype == "bf16",
            shared_vision=self.shared_vision,
            head=teacher.head if teacher is not None and running is None else None,
            at_images=any(isinstance(term, Term) and term.on == "images" for term in self.terms),
            several=self.parts.running_members,
        )

    def _start_engine(self) -> Engine:
        """Hand student, losses and optimizer to DeepSpeed, which shards them over the ranks."""
        config, student = self.config, self.student
        task = DistillationTask(
            student,
            self.terms,
            recompute_logits=config.training.recompute_logits,
            sequence=self.sequence,
            shared_vision=self.shared_vision,
            importance=self.importance,
        )
        section = config.optimizer
        scales = lr_scales(student.parts, section.part_lr, section.lr)
        optimizer = build_optimizer(task, section, scales, student.head.parameters)
        engine = Engine(task, optimizer, config, self.processes, read_parameters=task.read_parameters())
        running = self.parts.running_teacher
        if self.parts.same_encoder and config.deepspeed.stage < 3:
            assert running is not None
            share_vision_weights(student, running)
        student.synced = config.deepspeed.stage == 3 and self.processes.world > 1
        if config.deepspeed.stage == 3:
            student.head.gather = gather_parameters  # for reads of the head outside the task's forward
        return engine

    def _open_on_policy(self) -> OnPolicy | None:
        """Return what replaces answers in on-policy steps, if the run has any."""
        if self.config.on_policy is None:
            return None
        assert self.loss_teacher is not None
        rollouts = None
        if self.config.on_policy.server is not None:
            rollouts = Rollouts(self.config, self.student, self.processes, self.student_state)
        rest = self.parts.load_image, self.processes, self.steps, self.lower_is_better, rollouts
        return OnPolicy(self.config, self.dataset, self.student, self.loss_teacher, *rest)

    def step_context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.sequence is None else self.sequence.shared()

    def batches(self, start: int, stop: int) -> Generator[Step]:
        data = self.config.data
        steps = make_loader(self.dataset, start, stop, workers=min(data.workers, cores()), prefetch=data.prefetch)
        if self.loss_teacher is None or self.on_policy is not None:  # nothing can be asked of answers not drawn yet
            return steps
        return self.loss_teacher.prefetch(steps)

    def locate_samples(self, step: Step, number: int) -> str:
        answers = len(step.batches) // self.accumulation  # 2 where data's and own answers take turns
        return self.dataset.locate_samples(step.index, number // answers)

    def describe_batch(self, micro: DistillationBatch) -> str:
        rows, tokens = micro.student.inputs["input_ids"].shape
        return f"{rows} rows × {tokens} tokens with {micro.images} images"

    def prepare_step(self, step: Step) -> Step:
        if self.on_policy is None:
            return step
        prepared = self.on_policy.prepare_step(step)
        if self.loss_teacher is not None:
            for batch in prepared.batches:
                self.loss_teacher.request(batch)
        return prepared

    def local_counts(self, step: Step) -> dict[str, float]:
        sides = [batch.student for batch in step.batches]
        sides += [batch.teacher for batch in step.batches if batch.teacher is not None]
        for batch in step.batches:
            sides += [own.student for own in batch.taught.values()]
        counts = {
            **{f"data_{unit}": count for unit, count in step.counts(drawn=False).items()},
            **{f"own_{unit}": count for unit, count in step.counts(drawn=True).items()},
            "tokens": step.tokens,
            "samples": sum(batch.samples for batch in step.batches),
            "filled": sum(side.tokens for side in sides),
            "places": sum(side.inputs["input_ids"].numel() for side in sides),
            "flops": sum(self.flops.count(batch) for batch in step.batches),
        }
        if self.on_policy is not None:
            counts |= self.on_policy.counts
        if self.sequence is not None and self.sequence.rank:
            return dict.fromkeys(counts, 0)  # the first of the ranks that share samples counts them
        return counts

    def term_rows(self, term: Term | FeatureTerm, totals: Mapping[str, float]) -> float:
        unit, rows = unit_of(term), 0.0
        if acts_on(term, drawn=False):
            rows += totals[f"data_{unit}"]
        if acts_on(term, drawn=True):
            rows += totals[f"own_{unit}"]
        return rows

    def weight_factor(self, term: Term | FeatureTerm, step: int) -> float:
        return 1.0 if self.on_policy is None else self.on_policy.weight_factor(term, step)

    def forward_batch(
        self, step: Step, micro: DistillationBatch, scales: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, TermSums]]:
        batch = micro.to(self.processes.device)
        targets = self.loss_teacher.outputs(batch, self.features) if self.loss_teacher is not None else None
        loss, sums = self.engine(batch, targets, scales)
        if batch.comparisons:
            self.teacher_shares.add(sums)
        return loss, sums

    def skip_step(self, step: Step) -> None:
        if self.loss_teacher is not None:
            for batch in step.batches:
                self.loss_teacher.forget(batch)

    def after_update(self, step: int) -> None:
        if self.loss_teacher is not None and self.loss_teacher.ema is not None:
            self.loss_teacher.follow(self.engine.whole_weights(self.student))

    def lr(self, step: int) -> float:
        section = self.config.optimizer
        return section.lr * learning_rate_factor(
            step, self.steps, section.schedule, section.warmup, section.min_lr_ratio
        )

    def step_metrics(self, totals: Mapping[str, float], seconds: float) -> dict[str, float]:
        return {
            "supervised_tokens": int(totals["data_supervised"] + totals["own_supervised"]),
            "padding": 1 - totals["filled"] / totals["places"],
            **self.flops.metrics(totals["flops"], seconds, self.processes.world),
            **({} if self.on_policy is None else self.on_policy.metrics(totals, seconds)),
            **({} if self.importance is None else self.importance.metrics()),
            **(self.teacher_shares.metrics() if self.parts.members and self.loss_teacher is not None else {}),
            self.speed: totals["tokens"] / seconds,
        }

    def mistake_in(self, found: FirstSamples) -> str | None:
        if not found.images and all(must_be_alike([term]) for term in self.terms):
            return (
                f"loss: every term compares image tokens, and none of the first {found.tried} samples has an image, so "
                "that nothing would be learned; add a term on the text, or use data with images"
            )
        section = self.config.student
        trained = {*section.trained_whole, *([] if section.lora is None else section.lora.parts)}
        if found.images or "decoder" in trained or not self.student.processor.has_vision:
            return None
        return (
            f"student.train: only {' and '.join(sorted(trained))} would train, and none of the first {found.tried} "
            "samples has an image, so nothing would be learned; train the decoder too, or use data with images"
        )

    def evaluation_mistake(self) -> str | None:
        return self.evaluations.mistake()

    def remarks_on(self, found: FirstSamples) -> list[str]:
        remarks = []
        if not found.images and self.student.processor.has_vision:
            remarks.append(
                f"the student has a vision encoder, but none of the first {found.tried} samples has an image"
            )
        together = self.config.data.turns == "together" and not self.student.processor.frame.earlier
        if together and self._several_answers(found.tried):
            remarks.append(
                "the student's template shows an answer differently once another question follows; data.turns: split "
                "trains each answer of a conversation as it is generated"
            )
        return remarks

    def _several_answers(self, count: int) -> bool:
        """Return whether one of the first samples is a conversation with several answers."""
        mixture = self.dataset.mixture
        first = chain.from_iterable(mixture.samples_of(step) for step in range(self.steps))
        for source, row in islice(first, count):
            try:
                sample = mixture.sources[source][row]
            except BadSample:
                continue
            if isinstance(sample, Conversation) and sum(map(is_answer, sample.messages)) > 1:
                return True
        return False

    def introduce(self, tracker: Tracker, done: int) -> None:
        if self.parts.kept is not None:
            assert self.teacher is not None
            assert self.teacher.model is not None
            tracker.say(f"the student keeps of its teacher: {describe_kept(self.parts.kept, self.teacher.model)}")
        if self.shared_vision:
            tracker.say("the vision encoder is frozen and the teacher's: it runs once, for both")
        cache = self.parts.feature_cache
        if cache is not None:
            whose = "student's and the teacher's" if self.parts.same_encoder else "student's"
            tracker.say(
                f"the {whose} vision encoder does not run in training: {cache.folder} holds features of "
                f"{len(cache):,} images"
            )
        teacher = self.loss_teacher
        if teacher is not None and (teacher.head is not None or self.parts.members) and done < self.steps:
            self._check_teachers(teacher, tracker)

    def _check_teachers(self, teacher: Teacher, tracker: Tracker) -> None:
        """Report a teacher's own loss on the first answers. Warn if it is hardly better than a guess."""
        for name, (loss, limit) in self._teacher_losses(teacher).items():
            who = f"the teacher {name}" if name else "the teacher"
            if loss > limit:
                tracker.warn(
                    f"{who}'s own loss on the answers is {loss:.2f} nats a token, hardly "
                    "better than a guess: its chat template, tokenizer or weights do not fit this data; see "
                    "`vlm-distill inspect`"
                )
            else:
                tracker.say(f"{who}'s own loss on the answers: {loss:.3f} nats a token")

    @torch.no_grad()
    def _teacher_losses(self, teacher: Teacher) -> dict[str, tuple[float, float]]:
        """Return the teacher's cross-entropy on the first samples' answers, and the value above which it is suspect.

        Several teachers are listed by name. A teacher is left out if no sample has an answer for it, or if only its
        likeliest tokens are known.
        """
        data, pairs, shown = self.config.data, list[Pair](), list[Any]()
        for source, row in self.dataset.mixture.samples_of(0)[:_CHECKED_SAMPLES]:
            if not data.train[source].labelled:
                continue
            try:
                sample, images = load_images(self.sources[source][row], self.parts.load_image)
                pairs += self.dataset.collator.encode(sample, images, (source, row))
                shown += self.dataset.collator.parts(sample, images) if teacher.needs_images else []
            except BadSample:
                continue
        if not pairs:
            return {}
        batch = self.dataset.collator.batch(pairs).to(self.processes.device)
        batch.conversations = shown
        outputs = teacher.outputs(batch)
        answered = {name: (outputs.taught.get(name), own.targets) for name, own in batch.taught.items()}
        found = {}
        for name, (targets, answers) in (answered or {"": (outputs.targets, batch.teacher_targets)}).items():
            if isinstance(targets, HiddenTargets) and (len(answers) or not name):
                found[name] = _mean_loss(targets, answers)
        return found

    def evaluate(self, done: int, tracker: Tracker, *, final: bool) -> tuple[float | None, list[Problem]]:
        score, problems = self.evaluations.run(done, tracker, self.began, final=final)
        if self.on_policy is not None:
            self.on_policy.after_evaluation(score)
        return score, problems

    def save_more(self, folder: Path) -> None:
        if self.on_policy is not None:
            self.on_policy.save(folder)
        if self.loss_teacher is not None and self.processes.first:
            self.loss_teacher.save_state(folder)

    def load_more(self, folder: Path) -> None:
        if self.on_policy is not None:
            self.on_policy.restore(folder)
        if self.loss_teacher is not None:
            self.loss_teacher.load_state(folder)

    def write_student(self, folder: Path, state: dict[str, Tensor]) -> None:
        write_student(self.config, self.student, folder, state)

    def final_summary(self) -> dict[str, Any]:
        found = {"benchmarks": self.evaluations.scores, "answers_per_second": self.evaluations.speeds}
        return {name: values for name, values in found.items() if values}


def _mean_loss(outputs: HiddenTargets, answers: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy at some positions, and a value that is hardly better than a guess."""
    term = losses.fused_linear(losses.CrossEntropy(), outputs.hidden, outputs.head, None, answers).terms["loss"]
    with outputs.head.weight() as weight:
        limit = _SUSPECT_TEACHER * math.log(len(weight))
    return float(term.loss) / max(1, term.count), limit


train = Trainer.train
