"""Distilling a classifier: what the shared loop does with labelled images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Problem, Step
from data.classification import LabelledImages, open_images
from data.errors import BadSample, UserError
from data.images import load_image
from data.loader import problem_of
from data.mixture import Mixture
from data.workers import make_loader
from vlm_distill.caching.class_logits import LogitCache
from vlm_distill.caching.store import fingerprint
from vlm_distill.evaluation.left_out import reasons
from vlm_distill.evaluation.question_source import evenly_spaced
from vlm_distill.losses import BatchLoss, FeatureLoss, FeatureTerm, Term, TermSums, wanted_features
from vlm_distill.runtime.launch import cores
from vlm_distill.runtime.processes import Processes
from vlm_distill.runtime.tracking import Tracker
from vlm_distill.training.effects import late_warmup
from vlm_distill.training.engine import Engine
from vlm_distill.training.intake import FIRST_SAMPLES
from vlm_distill.training.loop import Loop
from vlm_distill.training.loss_mistakes import loss_mistakes
from vlm_distill.training.optimizers import classifier_optimizer

from . import losses
from .classes import map_classes
from .classifier import Classifier, Outputs, load_classifier
from .config import ClassifierConfig, ClassifierSection
from .device_views import DeviceViews
from .ema import Average
from .loader import ImageBatch, ImageSteps
from .optimizer import Schedule
from .predict import in_words, predict
from .task import AnyTerm, BatchTerm, ClassificationTask

_CHECKED_IMAGES = 64


def train(config: ClassifierConfig, processes: Processes, *, until: int | None = None) -> Path:
    """Trains a classifier, evaluates it and its teacher, and exports it; returns the run's folder.

    Args:
        config: the run.
        processes: the ranks; every rank calls this.
        until: stop (with a checkpoint) after this many optimizer steps of the whole schedule.

    Raises:
        UserError: the configuration asks for what cannot be.
    """
    return Trainer(config, processes).run(until)


@loss_mistakes()
def build_terms(config: ClassifierConfig) -> list[AnyTerm]:
    """The loss's terms, named by their losses (and numbered where one loss stands twice)."""
    terms: list[AnyTerm] = []
    for section in config.loss:
        loss = losses.build(section.name, **(section.model_extra or {}))
        if "teacher" in loss.needs and config.teacher is None:
            raise UserError(f"loss {section.name} needs a teacher; add a teacher section or use cross_entropy alone")
        taken = [term.name for term in terms]
        name = section.name if section.name not in taken else f"{section.name}_{len(taken) + 1}"
        if isinstance(loss, BatchLoss):
            if loss.views > 1 and loss.views != len(config.data.views):
                raise UserError(
                    f"loss {section.name} compares {loss.views} views of an image and data.views has "
                    f"{len(config.data.views)}; give a weak and a strong one"
                )
            terms.append(BatchTerm(name, loss, section.weight))
        elif isinstance(loss, FeatureLoss):
            terms.append(FeatureTerm(name, loss, section.weight))
        else:
            terms.append(Term(name, loss, section.weight))
    return terms


class Teacher:
    """A frozen classifier, its classes brought into the student's order, its logits kept on disk where asked.

    Args:
        classifier: on its device.
        order: int64 ``[C]``, the teacher's output for each of the student's; ``None`` where they are the same.
        features: what losses read beside the logits.
        dtype: of autocast; ``None`` computes in float32.
        cache: of its logits of fixed views.
    """

    def __init__(
        self,
        classifier: Classifier,
        order: Tensor | None,
        features: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        cache: LogitCache | None = None,
    ) -> None:
        self.classifier = classifier.requires_grad_(False).eval()
        self.order, self.features, self.dtype, self.cache = order, features, dtype, cache

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Outputs:
        """What it gives for normalised images ``[n, 3, H, W]`` of its own size."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            logits, features, _ = self.classifier(images, self.features)
        return Outputs(logits if self.order is None else logits[:, self.order], features, None)

    def remembered(self, batch: ImageBatch, images: Tensor, first: int) -> Outputs:
        """The same from the cache, which is filled where a batch is not in it yet; ``first`` is its first view."""
        assert self.cache is not None
        count = len(batch.images) // batch.samples
        checks = batch.checks.chunk(count)
        found = [self.cache.read(batch.rows, first + view, checks[view]) for view in range(count)]
        kept = [logits for logits in found if logits is not None]
        if len(kept) == count:
            return Outputs(torch.cat(kept).to(images.device, non_blocking=True), {}, None)
        outputs = self.outputs(images)
        for view, logits in enumerate(outputs.logits.chunk(count)):
            self.cache.write(batch.rows, first + view, checks[view], logits)
        return outputs


class Trainer(Loop):
    """Everything of a run, built in the order in which its mistakes are cheapest to find."""

    command, speed = "classify", "images_per_second"
    student: Classifier
    dataset: ImageSteps
    terms: Sequence[AnyTerm]  # type: ignore[assignment]  # a term of a batch has what the loop reads

    def __init__(self, config: ClassifierConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        self.config = config
        terms = build_terms(config)
        sources = open_sources(config.data.train)
        self.held_out = open_sources(config.data.eval)
        roots = [Path(root) for root in config.data.roots]
        self.load_image = partial(load_image, roots=roots, max_pixels=config.data.max_pixels)
        settings, training = config.evaluation, config.training
        names = [source.name for source in self.held_out]
        if settings.best is not None:
            if settings.best not in names:
                raise UserError(
                    f"evaluation.best: {settings.best} is not among data.eval ({', '.join(names) or 'none'})"
                )
            self.compared_by = {"name": settings.best, "limit": settings.limit}

        device = processes.device
        classes = sources[0].classes
        teacher = load(config.teacher, classes, "teacher") if config.teacher is not None else None
        # After the teacher, so that a student starts from the same weights with and without one.
        torch.manual_seed(training.seed)
        student = load(config.student, classes, "student", train=config.student.train)
        told = [f"student: {note}" for note in student.notes]
        told += [f"teacher: {note}" for note in teacher.notes] if teacher is not None else []
        label_maps = []
        for source in sources:
            mapped = map_classes(
                student.classes,
                None if teacher is None else teacher.classes,
                source.classes,
                student_outputs=student.num_classes,
                teacher_outputs=None if teacher is None else teacher.num_classes,
            )
            label_maps.append(None if mapped.labels is None else mapped.labels.tolist())
            told += mapped.notes
        order = mapped.teacher_index
        self.remarks = list(dict.fromkeys(told))

        guide = teacher if any("teacher" in term.loss.needs for term in terms) else None
        prepare_losses(terms, student, guide)
        if training.activation_checkpointing:
            student.checkpoint_activations()

        views = len(config.data.views)
        mixture = Mixture(
            sources,
            [section.weight for section in config.data.train],
            seed=training.seed,
            batch_size=training.batch_size,
        )
        cached = config.teacher is not None and config.teacher.cache is not None
        self.dataset = ImageSteps(
            mixture,
            student.inputs,
            config.data.views,
            label_maps,
            rank=processes.rank,
            world=processes.world,
            micro_batch_size=self.micro,
            accumulation=self.accumulation,
            roots=roots,
            max_pixels=config.data.max_pixels,
            on_bad=config.data.bad_samples,
            fixed_views=config.data.fixed_views,
            repeats=config.data.repeats,
            checks=cached,
        )
        self.epoch_steps = self.dataset.steps_per_epoch
        self.steps = training.steps or math.ceil((training.epochs or 0) * self.epoch_steps)
        epochs = self.steps / self.epoch_steps
        warmups = {"optimizer.warmup_epochs": config.optimizer.warmup_epochs}
        warmups |= {f"loss.{i}.warmup_epochs": section.warmup_epochs for i, section in enumerate(config.loss)}
        for key, length in warmups.items():
            self.remarks = [*self.remarks, *late_warmup(key, length, epochs, "epochs")]
        every = settings.every_epochs
        self.evaluate_every = None if every is None else max(1, round(every * self.epoch_steps))

        self.parameters = {
            "student": sum(p.numel() for p in student.parameters()),
            "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
        }
        if not self.parameters["trained"]:
            raise UserError("student.train: nothing is left to train")
        student.to(device)
        self.dtype = torch.bfloat16 if training.dtype == "bf16" else None
        self.teacher: Teacher | None = None
        self.guide: Teacher | None = None
        if teacher is not None:
            self.parameters["teacher"] = sum(p.numel() for p in teacher.parameters())
            teacher.to(device)
            if training.channels_last:
                teacher.to(memory_format=torch.channels_last)
            features = wanted_features([term for term in terms if isinstance(term, FeatureTerm)])[1]
            cache = self._open_cache(teacher, order, student) if cached else None
            if cache is not None and features:
                raise UserError("teacher.cache: keeps logits, and a loss reads the teacher's features; leave out one")
            self.teacher = Teacher(teacher, order, features, dtype=self.dtype, cache=cache)
            self.guide = self.teacher if guide is not None else None
        self.on_device = DeviceViews(
            student.inputs,
            guide.inputs if guide is not None else None,
            student.num_classes,
            erasing=config.data.erasing,
            mixing=config.data.mixing,
            device=device,
            channels_last=training.channels_last,
        )
        self.average = Average(student, training.ema) if training.ema is not None else None
        if training.compile:
            for model in (student.model, teacher and teacher.model):
                if model is not None:
                    model.compile()
        gather = processes.gather_rows if training.gather and processes.world > 1 else None
        task = ClassificationTask(student, terms, views=views, gather=gather)
        optimizer = classifier_optimizer(task.student.model, task.losses, config.optimizer, config.deepspeed.stage)
        self.engine = Engine(
            task, optimizer, config, processes, read_parameters=task.read_parameters(), autocast=self.dtype is not None
        )
        if training.channels_last and config.deepspeed.stage == 0:
            # Not before: DeepSpeed broadcasts weights as they lie. ZeRO keeps them in flat memory, in the usual order.
            student.to(memory_format=torch.channels_last)
        self.student, self.terms = student, terms
        self.warmups = {t.name: section.warmup_epochs for t, section in zip(terms, config.loss, strict=True)}
        self.schedule = Schedule(config.optimizer, self.steps, self.epoch_steps)

    def _open_cache(self, teacher: Classifier, order: Tensor | None, student: Classifier) -> LogitCache:
        section, data = self.config.teacher, self.config.data
        assert section is not None
        assert section.cache is not None
        identity = {
            "teacher's weights": fingerprint(teacher.state_dict()),
            "teacher's input": str(teacher.inputs),
            "student's input": str(student.inputs),
            "classes": "as the student's" if order is None else fingerprint({"order": order}),
            "data.views": str([view.model_dump() for view in data.views]),
            "training.seed": str(self.config.training.seed),
            "training.dtype": self.config.training.dtype,
        }
        sources = {source.name: len(source) for source in self.dataset.mixture.sources}
        views = data.fixed_views * len(data.views)
        return LogitCache(Path(section.cache), sources, views, student.num_classes, identity)

    def batches(self, start: int, stop: int) -> Iterator[Step]:
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

    def warm_up(self, term: AnyTerm, step: int) -> float:
        warmup = self.warmups[term.name]
        return min(1.0, (step // self.epoch_steps + 1) / warmup) if warmup else 1.0

    def forward_batch(
        self, step: Step, micro: ImageBatch, scales: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, TermSums]]:
        real = bool(micro.samples)
        batch = micro.to(self.processes.device).filled(len(self.config.data.views))
        views = self.on_device(batch, seed=self.config.training.seed, step=step.index)
        outputs = None
        if self.guide is not None:
            assert views.teacher is not None
            if self.guide.cache is not None and real:
                first = self.dataset.turn(step.index) * len(self.config.data.views)
                outputs = self.guide.remembered(batch, views.teacher, first)
            else:
                outputs = self.guide.outputs(views.teacher)
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
            self.engine.share_statistics(self.average.model)

    def student_state(self) -> dict[str, Tensor]:
        return super().student_state() if self.average is None else self.average.model.state_dict()

    def write_student(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.student.save_pretrained(folder, state)

    def save_more(self, folder: Path) -> None:
        if self.average is not None and self.processes.first:
            self.average.save(folder)

    def load_more(self, folder: Path) -> None:
        if self.average is not None:
            self.average.load(folder)

    def introduce(self, tracker: Tracker, done: int) -> None:
        if self.guide is None or done >= self.steps or not self.processes.first:
            return
        seen = self._teacher_accuracy(self.guide)
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
        """How many of some training images, without augmentation, it gets right."""
        steps = ImageSteps(
            self.dataset.mixture,
            self.student.inputs,
            label_maps=self.dataset.label_maps,
            micro_batch_size=self.dataset.mixture.batch_size,
            roots=self.dataset.roots,
            max_pixels=self.dataset.max_pixels,
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
        settings, processes = self.config.evaluation, self.processes
        chosen: float | None = None
        problems: list[Problem] = []
        student = self.student if self.average is None else self.average.model
        models: dict[str, Classifier] = {"student": student}
        if final and self.teacher is not None and settings.teacher:
            models = {"teacher": self.teacher.classifier, "student": student}
        for source in self.held_out:
            theirs: dict[int, Tensor] | None = None
            for who, model in models.items():
                mapped = map_classes(model.classes, None, source.classes, student_outputs=model.num_classes)
                kept: dict[int, Tensor] | None = {} if who == "teacher" else None
                folder = self.folder / "evaluation" / source.name
                scores = predict(
                    model,
                    source,
                    batch_size=settings.batch_size,
                    workers=min(self.config.data.workers, cores()),
                    device=processes.device,
                    channels_last=self.config.training.channels_last,
                    dtype=self.dtype,
                    limit=None if final else settings.limit,
                    rank=processes.rank,
                    world=processes.world,
                    all_gather=processes.gather,
                    out=folder / who if final else None,
                    pictures=folder / "pictures" if final and who == "student" else None,
                    label_map=None if mapped.labels is None else mapped.labels.tolist(),
                    logits=kept,
                    teacher=theirs,
                    load=self.load_image,
                    skipped=problems if who == "student" else None,
                )
                theirs = kept if who == "teacher" else theirs
                if who == "student" and scores["n"]:
                    plain = {k: v for k, v in scores.items() if isinstance(v, int | float)}
                    tracker.log("eval", done, {"data": source.name, **plain, "seconds": time.monotonic() - self.began})
                    if source.name == settings.best:
                        chosen = scores["exact"]
                where = f"step {done}" if who == "student" else who
                tracker.say(f"{where}: {source.name}: {in_words(scores)}")
        return chosen, problems


def open_sources(sections: Sequence[Any]) -> list[LabelledImages]:
    """The readers of a configuration's sources of labelled images."""
    return [open_images(**section.model_dump(exclude={"weight"}, exclude_none=True)) for section in sections]


def load(section: ClassifierSection, classes: Sequence[str], role: str, **more: Any) -> Classifier:
    """A classifier by its section; one without weights has an output for each of the data's classes."""
    given = section.model_dump(exclude={"train", "cache"})
    fresh = not (section.pretrained or section.weights or Path(section.name).is_dir())
    if fresh and section.source == "timm" and section.num_classes is None:
        given["num_classes"] = len(classes)
    if section.classes is None and given["num_classes"] == len(classes):
        given["classes"] = list(classes)
    name = given.pop("name")
    try:
        return load_classifier(name, **given, **more)
    except UserError as error:
        raise UserError(f"{role}: {error}") from None


@loss_mistakes()
def prepare_losses(terms: Sequence[AnyTerm], student: Classifier, teacher: Classifier | None) -> None:
    """Tells the losses the number of classes and the features' shapes, so that what they learn exists before training.

    Raises:
        UserError: a classifier cannot give what a loss reads.
    """
    for term in terms:
        if isinstance(term, Term):
            term.loss.prepare(student.num_classes)
        elif isinstance(term, FeatureTerm):
            assert teacher is not None
            shapes = []
            for role, model, names in (
                ("student", student, term.loss.student_features),
                ("teacher", teacher, term.loss.teacher_features),
            ):
                try:
                    shapes.append({name: model.feature_shape(name) for name in names})
                except UserError as error:
                    raise UserError(f"loss {term.name}: {role}: {error}") from None
            term.loss.prepare(*shapes)
