"""Run: the parts that a configuration describes, made in one order by every command that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.batch import Encoded, SampleId
from data.collate import Collator
from data.conversation import ImageSource
from data.errors import BadSample
from data.lessons import Lesson, SeveralCollator
from data.loader import StepDataset, StepSplit
from data.mixture import Mixture
from data.plain_text import TextSource
from data.sample_images import load_images
from data.sources import Source
from data.teacher_view import View
from vlm_distill.caching.check_features import open_features
from vlm_distill.caching.check_tokens import check_tokens
from vlm_distill.caching.image_features import FeatureCache
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import must_be_alike, wanted_features
from vlm_distill.models.common import DTYPES
from vlm_distill.models.decoder_features import VISION_FEATURES
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.lora import WithoutAdapters
from vlm_distill.models.processor import Processor
from vlm_distill.models.pruning import Kept
from vlm_distill.models.self_teacher import SelfTeacher
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.models.several_teachers import SeveralTeachers
from vlm_distill.models.shared_processing import share_processing
from vlm_distill.models.shared_vision import has_same_vision
from vlm_distill.models.teacher import ModelTeacher, Teacher
from vlm_distill.runtime.processes import Processes
from vlm_distill.training.compatibility import (
    check_evaluations,
    check_packing,
    check_precision,
    divide_sequences,
    pair_several,
    pair_vocabularies,
    template_remarks,
)
from vlm_distill.training.loading import load_student, load_teacher
from vlm_distill.training.on_policy import check_on_policy
from vlm_distill.training.open_data import image_loader, open_sources, teacher_view, turns
from vlm_distill.training.packing_plan import Packing, plan_packing
from vlm_distill.training.student_cut import choose_kept
from vlm_distill.training.terms import AnyTerm, build_terms, prepare_losses

AnySource = Source | TextSource


def _needed(teacher: Teacher | None) -> Teacher:
    assert teacher is not None
    return teacher


class Run:
    """The parts of a run, each made when it is first asked for, after the parts that it is made from.

    Commands ask in this order, since mistakes are cheapest to find before a model is loaded::

        terms      build the loss's terms
        sources    open the readers of data.train
        teacher    load it, shard it, connect to its server or open its cache
        student    load it after the teacher, so that its initial weights are the same with and without one
        grouped    pair the vocabularies: cut both heads to the tokens that are compared
        prepare()  make losses, models and data fit each other, or refuse them
        dataset    deal the samples to this rank's micro-batches

    Args:
        config: the run.
        processes: the ranks; every rank makes the same parts. ``None``: models have no weights, and no server is asked
            and no cache opened. The caller keeps ``models.weightless.Weightless`` open while models are made.
    """

    def __init__(self, config: RunConfig, processes: Processes | None = None) -> None:
        self.config, self.processes = config, processes
        self._cache_remarks: list[str] = []

    @cached_property
    def terms(self) -> list[AnyTerm]:
        """The terms of the loss."""
        terms = build_terms(self.config)
        check_on_policy(self.config, terms)
        return terms

    @cached_property
    def sources(self) -> list[AnySource]:
        """The readers of ``data.train``."""
        return open_sources(self.config.data.train, self.config.data.max_length, "data.train")

    @cached_property
    def load_image(self) -> Callable[[ImageSource], Image.Image]:
        """Decodes an image within the limits of the data section."""
        return image_loader(self.config.data)

    @cached_property
    def teacher(self) -> Teacher | None:
        """The teacher, even if no loss learns from it and it is only evaluated with the student."""
        if self.members:
            return SeveralTeachers({name: _needed(member.teacher) for name, member in self.members.items()})
        section = self.config.teacher
        if section is None or not section.from_student:
            return load_teacher(self.config, self.processes)
        student = self.student
        if self.config.taught_by_base:
            teacher = ModelTeacher(WithoutAdapters(student))
        else:
            device = torch.device("cpu") if self.processes is None else self.processes.device
            teacher = SelfTeacher(student, DTYPES[self.config.training.dtype], device, section.ema)
        if section.view is not None and section.view.images == "full":
            teacher.processor = student.processor.as_loaded()
        return teacher

    @cached_property
    def members(self) -> dict[str, Run]:
        """With several teachers, the run with each alone, for its teacher and sources; its student is never asked."""
        return {name: Run(self.config.only(name), self.processes) for name in self.config.teachers}

    @cached_property
    def uncached(self) -> Run:
        """The same run with the teacher itself in place of its cache: to fill that, or to ask the teacher questions."""
        section = self.config.teacher
        if section is None or section.cache is None:
            return self
        plain = section.model_copy(update={"cache": None})
        return Run(self.config.model_copy(update={"teacher": plain}), self.processes)

    @cached_property
    def student(self) -> VisionLanguageModel:
        """The student, with its trained parts marked."""
        section = self.config.teacher
        teacher = None if section is not None and section.from_student else self.teacher
        # The seed is set once the teacher is loaded: a student starts from the same weights with and without one.
        torch.manual_seed(self.config.training.seed)
        return load_student(self.config, teacher, self.kept)

    @cached_property
    def kept(self) -> dict[str, Kept] | None:
        """What the student keeps of the teacher that it is pruned from, by part; ``None`` for a student of its own."""
        section = self.config.student.from_teacher
        if section is None:
            return None
        teacher = self.teacher  # not before: a teacher made from the student would ask for the student
        assert isinstance(teacher, ModelTeacher)
        rows = self._teacher_rows(teacher.processor, section.calibrate)
        return choose_kept(section, teacher, rows, Path(self.config.output), self.processes)

    def _teacher_rows(self, processor: Processor, count: int) -> Iterator[Encoded]:
        """Encode the first samples of the training data for the teacher alone; of each, what is first a row."""
        alone = Collator(processor, None, self.config.data.max_length, turns(self.config.data))
        for source, row in dict.fromkeys(self.first_samples(count)):
            try:
                pairs = alone.encode(*load_images(self.sources[source][row], self.load_image))
            except BadSample:
                continue
            yield pairs[0].student

    @cached_property
    def loss_teacher(self) -> Teacher | None:
        """The teacher, if a loss learns from it."""
        return self.teacher if any("teacher" in term.loss.needs for term in self.terms) else None

    @cached_property
    def running_teacher(self) -> VisionLanguageModel | None:
        """The teacher's model, if it runs in training; ``None`` if the outputs come from a cache or a server.

        Also ``None`` with several teachers; each of :attr:`members` has its own.
        """
        cached = self.config.teacher is not None and self.config.teacher.cache is not None
        return None if self.loss_teacher is None or cached else self.loss_teacher.model

    @property
    def running_members(self) -> dict[str, VisionLanguageModel]:
        """The models of several teachers that run in training, by name."""
        found = {name: member.running_teacher for name, member in self.members.items()}
        return {name: model for name, model in found.items() if model is not None}

    @cached_property
    def grouped(self) -> bool:
        """Whether groups of tokens are compared, since the tokenizers differ. Cuts the heads to what is compared."""
        if self.members:
            return any(self.grouped_with.values())
        return self.teacher is not None and pair_vocabularies(self.config, self.student, self.teacher, self.terms)

    @cached_property
    def grouped_with(self) -> dict[str, bool]:
        """The same for each of several teachers. Cuts the heads to the tokens that the student shares with all."""
        teachers = {name: _needed(member.teacher) for name, member in self.members.items()}
        configs = {name: member.config for name, member in self.members.items()}
        return pair_several(configs, self.student, teachers, self.terms)

    @cached_property
    def sequence(self) -> SequenceParallel | None:
        """The ranks that share this one's samples, if ranks do."""
        size = self.config.training.sequence_parallel
        if size == 1:
            return None
        if self.processes is None:
            return SequenceParallel(None, 0, size)
        return SequenceParallel(self.processes.neighbours(size), self.processes.rank % size, size)

    @cached_property
    def same_encoder(self) -> bool:
        """Whether the student sees as the running teacher does, in the same precision, with frozen parts."""
        section, teacher = self.config.teacher, self.running_teacher
        return (
            teacher is not None
            and (section is None or section.placement == "replicate")
            and teacher.dtype == DTYPES[self.config.training.dtype]
            and (section is None or section.view is None or section.view.images == "same")
            and has_same_vision(self.student, teacher)
        )

    @property
    def shared_vision(self) -> bool:
        """Whether the vision encoder runs in the teacher alone, for both models."""
        return self.same_encoder and self.config.student.vision_cache is None

    @property
    def teacher_features(self) -> list[str]:
        """Names of the teacher's activations that are needed in addition to its logits."""
        shared = [VISION_FEATURES] if self.shared_vision else []
        return sorted({*wanted_features(self.terms)[1], *shared})

    @cached_property
    def feature_cache(self) -> FeatureCache | None:
        """The cache of what the student's vision encoder makes of images, if there is one."""
        return open_features(self.config, self.student)

    @cached_property
    def image_features(self) -> Callable[[Sequence[Image.Image]], Tensor] | None:
        """Return what a frozen vision encoder makes of images, if processors read that in place of pixels."""
        return self.feature_cache

    @cached_property
    def processors(self) -> tuple[Any, Any]:
        """What encodes samples for the student and for the teacher that losses learn from."""
        student, teacher = self.student.processor, None
        if self.loss_teacher is not None and not self.members:
            teacher = self.loss_teacher.processor
        if self.image_features is not None:
            student = student.with_features(self.image_features)
            if self.same_encoder:
                assert isinstance(teacher, Processor)
                teacher = teacher.with_features(self.image_features)
        return share_processing(student, teacher)

    @cached_property
    def packing(self) -> Packing:
        """Whether conversations share rows."""
        return plan_packing(self.config.data, self.student, self.running_teacher)

    def prepare(self) -> None:
        """Make losses, models and data fit each other, in the only order that works; called once.

        Raises:
            UserError: they do not fit.
        """
        config, student, teacher = self.config, self.student, self.running_teacher
        check_precision(config, student, teacher)

        # Cut the heads before anything reads their vocabulary.
        grouped = self.grouped
        for name, one in self.members.items() or [("", self)]:
            found = one.teacher
            if found is not None and found.cache is not None:
                prefix = f"teachers.{name}: " if name else ""
                self._cache_remarks += [prefix + remark for remark in check_tokens(one.config, one.sources, found)]
        prepare_losses(self.terms, student, self.loss_teacher)

        # Divide the decoders while they are whole, and compare the vision encoders while both are as they were loaded.
        if self.sequence is not None:
            divide_sequences(config, self.sequence, student, teacher, self.terms, grouped)
        _ = self.same_encoder, self.processors
        if config.training.activation_checkpointing:
            student.checkpoint_activations()
        if self.processes is not None and self.processes.device.type == "cuda":
            student.to(self.processes.device)

        # Packing is tried by running the models, on the device where they will run.
        _ = self.packing
        check_packing(config.data.train, student, teacher, grouped)
        for name, member in self.members.items():
            check_packing(member.config.data.train, None, member.running_teacher, self.grouped_with[name])
            check_precision(member.config, student, member.running_teacher)
        check_evaluations(config, student, [] if self.teacher is None else list(self.teacher.models.values()))

    @cached_property
    def remarks(self) -> list[str]:
        """What a person should know about cache, chat templates and packing, after :meth:`prepare`."""
        single = None if self.members else self.loss_teacher
        other = None if single is None or self.grouped else single.processor
        compared = other if isinstance(other, Processor) else None
        templates = template_remarks(self.student.processor, compared, self.config.data.max_length)
        return [*self._cache_remarks, *templates, *self.packing.remarks]

    @property
    def view(self) -> View | None:
        """What the teacher sees of a sample; ``None`` if that is the same, or its outputs are only looked up."""
        cached = self.teacher is not None and self.teacher.cache is not None
        return None if cached else teacher_view(self.config.teacher)

    @cached_property
    def collator(self) -> Collator:
        """Turns samples into micro-batches."""
        if self.members and self.loss_teacher is not None:
            return self._several_collator()
        return self._collator_with(*self.processors, self.grouped, self.packing.packed, self.view)

    def _collator_with(
        self, student: Any, teacher: Any, grouped: bool, packed: tuple[bool, bool], view: View | None
    ) -> Collator:
        data, alike = self.config.data, must_be_alike(self.terms)
        return Collator(student, teacher, data.max_length, turns(data), grouped, packed, alike, view)

    def _several_collator(self) -> SeveralCollator:
        """Return a collator that deals each source's samples to its teachers."""
        student, train = self.processors[0], self.config.data.train
        members, own, shown = {}, {}, []
        for name, member in self.members.items():
            teacher = _needed(member.teacher)
            both = share_processing(student, teacher.processor)
            packed = plan_packing(self.config.data, self.student, member.running_teacher).packed
            members[name] = self._collator_with(*both, self.grouped_with[name], packed, member.view)
            taught = [number for number, source in enumerate(train) if name in source.lesson]
            own[name] = {number: place for place, number in enumerate(taught)}
            shown += [name] if teacher.needs_images else []
        alone = self._collator_with(student, None, self.grouped, (self.packing.packed[0], False), None)
        lessons = [Lesson(source.lesson, source.combine) for source in train]
        return SeveralCollator(**vars(alone), members=members, lessons=lessons, own=own, shown=shown)

    @cached_property
    def dataset(self) -> StepDataset:
        """This rank's micro-batches, step by step."""
        config, processes = self.config, self.processes
        assert processes is not None
        micro, accumulation = split_batch(config, processes.world)
        sharing = config.training.sequence_parallel
        return StepDataset(
            self._mixture(config.training.batch_size, window=self.packing.window, longest_first=True),
            self.collator,
            StepSplit(micro, accumulation, rank=processes.rank // sharing, world=processes.world // sharing),
            load=self.load_image,
            on_bad=self.config.data.bad_samples,
            keep_conversations=self.loss_teacher is not None and self.loss_teacher.needs_images and not self.members,
        )

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self._mixture(self.config.training.batch_size).steps_per_epoch

    def first_samples(self, count: int) -> list[SampleId]:
        """Return the first samples that training meets."""
        return self._mixture(count).samples_of(0)

    def _mixture(
        self, batch_size: int, window: int = 0, *, longest_first: bool = False
    ) -> Mixture[Source | TextSource]:
        return Mixture(
            self.sources,
            [section.weight for section in self.config.data.train],
            seed=self.config.training.seed,
            batch_size=batch_size,
            window=window,
            longest_first=longest_first,
        )
