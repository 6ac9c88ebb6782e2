"""Train a classifier: the shared loop's hooks for labelled images."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.batch import Problem, Step
from data.classification import LabelledImages
from data.errors import BadSample, UserError
from data.loader import StepSplit, problem_of
from data.mixture import Mixture
from data.workers import make_loader
from vlm_distill.evaluation.left_out import reasons
from vlm_distill.evaluation.question_source import evenly_spaced
from vlm_distill.losses import FeatureTerm, TermSums, wanted_features
from vlm_distill.runtime.launch import cores
from vlm_distill.runtime.processes import Processes
from vlm_distill.runtime.tracking import Tracker
from vlm_distill.training.effects import late_warmup
from vlm_distill.training.engine import Engine
from vlm_distill.training.intake import FIRST_SAMPLES
from vlm_distill.training.loop import Loop
from vlm_distill.training.open_data import image_loader
from vlm_distill.training.optimizers import classifier_optimizer

from .build import build_terms, load_models, open_sources, pair_classes, prepare_losses
from .classes import map_classes
from .classifier import Classifier
from .config import ClassifierConfig
from .device_views import DeviceViews
from .ema import Average
from .loader import ImageBatch, ImageSteps, ViewSettings
from .optimizer import Schedule
from .predict import Inference, Labels, Predicted, in_words, predict
from .task import AnyTerm, BatchTerm, ClassificationTask
from .teacher import Teacher, open_cache

_CHECKED_IMAGES = 64


class Trainer(Loop):
    """Trains a classifier. Whatever is cheap to check is checked first."""

    command, speed = "classify", "images_per_second"
    student: Classifier
    dataset: ImageSteps
    terms: Sequence[AnyTerm]  # type: ignore[assignment]  # a term of a batch has what the loop reads

    def __init__(self, config: ClassifierConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        self.config = config
        self.terms = build_terms(config)
        sources = open_sources(config.data.train, "data.train")
        self._open_held_out()

        # Load the models, and bring the classes of data and teacher into the student's order.
        teacher, self.student = load_models(config, sources[0].classes)
        classes = pair_classes(sources, self.student, teacher)
        self.remarks = classes.notes
        taught = teacher if any("teacher" in term.loss.needs for term in self.terms) else None
        prepare_losses(self.terms, self.student, taught)
        if config.training.activation_checkpointing:
            self.student.checkpoint_activations()

        # Plan the steps.
        self.dataset = self._steps_of(sources, classes.label_maps)
        self._plan()
        self.parameters = _count_parameters(self.student, teacher)

        # Move the models to the device.
        self.dtype = torch.bfloat16 if config.training.dtype == "bf16" else None
        self.student.to(processes.device)
        self.teacher = None if teacher is None else self._place_teacher(teacher, classes.teacher_order)
        self.loss_teacher = None if taught is None else self.teacher
        self.on_device = DeviceViews(
            self.student.inputs,
            None if taught is None else taught.inputs,
            self.student.num_classes,
            erasing=config.data.erasing,
            mixing=config.data.mixing,
            device=processes.device,
            channels_last=config.training.channels_last,
        )
        self.average = None if config.training.ema is None else Average(self.student, config.training.ema)
        if config.training.compile:
            for model in (self.student, teacher):
                if model is not None:
                    model.model.compile()
        self.engine = self._start_engine()

    def _open_held_out(self) -> None:
        """Open ``data.eval``, and set how the best student is chosen."""
        data, settings = self.config.data, self.config.evaluation
        self.load_image = image_loader(data)
        self.held_out = open_sources(data.eval, "data.eval")
        if settings.best is None:
            return
        names = [source.name for source in self.held_out]
        if settings.best not in names:
            raise UserError(f"evaluation.best: {settings.best} is not among data.eval ({', '.join(names) or 'none'})")
        self.compared_by = {"name": settings.best, "limit": settings.limit}

    def _steps_of(self, sources: Sequence[LabelledImages], label_maps: Sequence[Sequence[int] | None]) -> ImageSteps:
        data, training = self.config.data, self.config.training
        weights = [section.weight for section in data.train]
        mixture = Mixture(sources, weights, seed=training.seed, batch_size=training.batch_size)
        checks = self.config.teacher is not None and self.config.teacher.cache is not None
        return ImageSteps(
            mixture,
            self.student.inputs,
            ViewSettings(data.views, data.fixed_views, data.repeats, checks),
            label_maps,
            split=StepSplit(self.micro, self.accumulation, self.processes.rank, self.processes.world),
            load=self.load_image,
            on_bad=data.bad_samples,
        )

    def _plan(self) -> None:
        """Set the number of steps, the schedule and the warm-ups, and remark on a warm-up longer than the run."""
        training, optimizer = self.config.training, self.config.optimizer
        self.epoch_steps = self.dataset.steps_per_epoch
        self.steps = training.steps or math.ceil((training.epochs or 0) * self.epoch_steps)
        every = self.config.evaluation.every_epochs
        self.evaluate_every = None if every is None else max(1, round(every * self.epoch_steps))
        self.schedule = Schedule(optimizer, self.steps, self.epoch_steps)

        sections = self.config.loss
        self.warmups = {term.name: section.warmup_epochs for term, section in zip(self.terms, sections, strict=True)}
        warmups = {"optimizer.warmup_epochs": optimizer.warmup_epochs}
        warmups |= {f"loss.{i}.warmup_epochs": section.warmup_epochs for i, section in enumerate(sections)}
        for key, length in warmups.items():
            self.remarks = [*self.remarks, *late_warmup(key, length, self.steps / self.epoch_steps, "epochs")]

    def _place_teacher(self, classifier: Classifier, order: Tensor | None) -> Teacher:
        section = self.config.teacher
        assert section is not None
        classifier.to(self.processes.device)
        if self.config.training.channels_last:
            classifier.to(memory_format=torch.channels_last)
        features = wanted_features([term for term in self.terms if isinstance(term, FeatureTerm)])[1]
        cache = None
        if section.cache is not None:
            sources = {source.name: len(source) for source in self.dataset.mixture.sources}
            cache = open_cache(self.config, sources, self.student, classifier, order)
        if cache is not None and features:
            raise UserError("teacher.cache: keeps logits, and a loss reads the teacher's features; leave out one")
        return Teacher(classifier, order, features, dtype=self.dtype, cache=cache)

    def _start_engine(self) -> Engine:
        training, stage = self.config.training, self.config.deepspeed.stage
        gather = self.processes.gather_rows if training.gather and self.processes.world > 1 else None
        task = ClassificationTask(self.student, self.terms, views=len(self.config.data.views), gather=gather)
        optimizer = classifier_optimizer(task.student.model, task.losses, self.config.optimizer, stage)
        engine = Engine(
            task,
            optimizer,
            self.config,
            self.processes,
            read_parameters=task.read_parameters(),
            autocast=self.dtype is not None,
        )
        if training.channels_last and stage == 0:
            # Not before: DeepSpeed broadcasts weights in memory order. ZeRO keeps them in flat, contiguous memory.
            self.student.to(memory_format=torch.channels_last)
        return engine

    def batches(self, start: int, stop: int) -> Generator[Step]:
        data = self.config.data
        workers = min(data.workers, cores())
        return make_loader(self.dataset, start, stop, workers=workers, prefetch=data.prefetch)

    def locate_samples(self, step: Step, number: int) -> str:
        return self.dataset.locate_samples(step.index, number)

    def describe_batch(self, micro: ImageBatch) -> str:
        views, _, height, width = micro.images.shape
        return f"{views} views of {height} × {width} pixels"

    def local_counts(self, step: Step) -> dict[str, float]:
        return {"samples": sum(batch.samples for batch in step.batches)}

    def term_rows(self, term: AnyTerm, totals: Mapping[str, float]) -> float:
        one = isinstance(term, BatchTerm) and term.loss.views > 1
        return totals["samples"] * (1 if one else len(self.config.data.views))

    def weight_factor(self, term: AnyTerm, step: int) -> float:
        warmup = self.warmups[term.name]
        return min(1.0, (step // self.epoch_steps + 1) / warmup) if warmup else 1.0

    def forward_batch(
        self, step: Step, micro: ImageBatch, scales: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, TermSums]]:
        real = bool(micro.samples)
        batch = micro.to(self.processes.device).filled(len(self.config.data.views))
        views = self.on_device(batch, seed=self.config.training.seed, step=step.index)
        outputs = None
        if self.loss_teacher is not None:
            assert views.teacher is not None
            if self.loss_teacher.cache is not None and real:
                first = self.dataset.turn(step.index) * len(self.config.data.views)
                outputs = self.loss_teacher.remembered(batch, views.teacher, first)
            else:
                outputs = self.loss_teacher.outputs(views.teacher)
        return self.engine(views, outputs, scales, real=real)

    def lr(self, step: int) -> float:
        return self.schedule(step)

    def step_metrics(self, totals: Mapping[str, float], seconds: float) -> dict[str, float]:
        return {self.speed: totals["samples"] / seconds}

    def after_update(self, step: int) -> None:
        if self.average is not None:
            self.average.update(self.student, step)

    def share_statistics(self) -> None:
        super().share_statistics()
        if self.average is not None:
            self.engine.share_statistics(self.average.module)

    def student_state(self) -> dict[str, Tensor]:
        return super().student_state() if self.average is None else self.average.module.state_dict()

    def write_student(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.student.save_pretrained(folder, state)

    def save_more(self, folder: Path) -> None:
        if self.average is not None and self.processes.first:
            self.average.save(folder)

    def load_more(self, folder: Path) -> None:
        if self.average is not None:
            self.average.load(folder)

    def introduce(self, tracker: Tracker, done: int) -> None:
        if self.loss_teacher is None or done >= self.steps or not self.processes.first:
            return
        seen = self._teacher_accuracy(self.loss_teacher)
        if seen is None:
            return
        right, count = seen
        chance = 1 / self.student.num_classes
        if right / count < max(3 * chance, 0.05) and chance < 0.3:
            tracker.warn(
                f"the teacher is right on {right} of the first {count} training images, hardly better than a guess: "
                "its classes, normalisation or weights do not fit this data"
            )
        else:
            tracker.say(f"the teacher is right on {right} of the first {count} training images")

    def _teacher_accuracy(self, teacher: Teacher) -> tuple[int, int] | None:
        """Return how many of some training images, without augmentation, the teacher gets right, and their number."""
        steps = ImageSteps(
            self.dataset.mixture,
            self.student.inputs,
            label_maps=self.dataset.label_maps,
            split=StepSplit(self.dataset.mixture.batch_size),
            load=self.load_image,
        )
        batch = steps.sample(_CHECKED_IMAGES).to(self.processes.device)
        if not batch.samples:
            return None
        plain = DeviceViews(
            self.student.inputs, teacher.classifier.inputs, self.student.num_classes, device=self.processes.device
        )
        seen = plain(batch, seed=0, step=0).teacher
        assert seen is not None
        answers = teacher.outputs(seen).logits.argmax(-1)
        return int((answers == batch.labels).sum()), batch.samples

    def evaluation_mistake(self) -> str | None:
        for source in self.held_out:
            problems = []
            for row in evenly_spaced(len(source), FIRST_SAMPLES):
                try:
                    self.load_image(source[row].image)
                    break
                except BadSample as bad:
                    problems.append(problem_of(source, row, bad, "skip"))
            else:
                return f"data.eval: no image of {source.name} can be read: {reasons(problems)}"
        return None

    def evaluate(self, done: int, tracker: Tracker, *, final: bool) -> tuple[float | None, list[Problem]]:
        chosen: float | None = None
        problems: list[Problem] = []
        for source in self.held_out:
            theirs = None
            if final and self.teacher is not None and self.config.evaluation.teacher:
                found = self._predict(source, "teacher", self.teacher.classifier, final=True)
                theirs = found.logits
                tracker.say(f"teacher: {source.name}: {in_words(found.scores)}")
            student = self.student if self.average is None else self.average.module
            found = self._predict(source, "student", student, final=final, teacher=theirs)
            problems += found.problems
            if found.scores["n"]:
                plain = {key: value for key, value in found.scores.items() if isinstance(value, int | float)}
                tracker.log("eval", done, {"data": source.name, **plain, "seconds": time.monotonic() - self.began})
                if source.name == self.config.evaluation.best:
                    chosen = found.scores["exact"]
            tracker.say(f"step {done}: {source.name}: {in_words(found.scores)}")
        return chosen, problems

    def _predict(
        self,
        source: LabelledImages,
        who: str,
        model: Classifier,
        *,
        final: bool,
        teacher: Mapping[int, Tensor] | None = None,
    ) -> Predicted:
        """Ask a model about held-out images; at the end of the run also write its answers."""
        settings, training, processes = self.config.evaluation, self.config.training, self.processes
        workers = min(self.config.data.workers, cores())
        mapped = map_classes(model.classes, None, source.classes, student_outputs=model.num_classes)
        found = predict(
            model,
            source,
            Inference(
                settings.batch_size, workers, processes.device, training.channels_last, self.dtype, self.load_image
            ),
            Labels(None if mapped.labels is None else mapped.labels.tolist()),
            limit=None if final and not training.smoke else settings.limit,
            ranks=processes.share,
            keep_logits=who == "teacher",
            teacher=teacher,
        )
        if final and processes.first:
            folder = self.folder / "evaluation" / source.name
            found.write(folder / who)
            if who == "student":
                found.write_gallery(folder / "pictures", self.load_image)
        return found


def _count_parameters(student: Classifier, teacher: Classifier | None) -> dict[str, int]:
    """Return the numbers of parameters by role; raise ``UserError`` if none would be trained."""
    counts = {
        "student": sum(p.numel() for p in student.parameters()),
        "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }
    if not counts["trained"]:
        raise UserError("student.train: nothing is left to train")
    if teacher is not None:
        counts["teacher"] = sum(p.numel() for p in teacher.parameters())
    return counts


train = Trainer.train
