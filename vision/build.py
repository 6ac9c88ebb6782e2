"""Make the parts of a classification run from its configuration: losses, data, models, classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.classification import LabelledImages, open_images
from data.errors import UserError
from vlm_distill.config.checks import check_losses
from vlm_distill.losses import BatchLoss, FeatureLoss, FeatureTerm, Term, term_name
from vlm_distill.training.loss_mistakes import loss_mistakes

from . import losses
from .classes import map_classes
from .classifier import Classifier, load_section
from .config import ClassifierConfig, ClassifierSection
from .task import AnyTerm, BatchTerm


@loss_mistakes()
def build_terms(config: ClassifierConfig) -> list[AnyTerm]:
    """Build the terms, named after their losses (and numbered if a loss occurs twice). Imports plug-ins.

    Raises:
        UserError: a loss cannot be built, or needs what this configuration does not give.
    """
    for section in config.loss:
        losses.REGISTRY.load(section.name)
    # Again, now that plug-ins are known.
    check_losses(config.loss, losses.REGISTRY, has_teacher=config.teacher is not None)
    terms: list[AnyTerm] = []
    for section in config.loss:
        loss = losses.build(section.name, **(section.model_extra or {}))
        name = term_name(section.name, [term.name for term in terms])
        if isinstance(loss, BatchLoss):
            if loss.views > 1 and loss.views != len(config.data.views):
                raise UserError(
                    f"loss {section.name} compares {loss.views} views of an image, but data.views has "
                    f"{len(config.data.views)}; give a weak and a strong one"
                )
            terms.append(BatchTerm(name, loss, section.weight))
        elif isinstance(loss, FeatureLoss):
            terms.append(FeatureTerm(name, loss, section.weight))
        else:
            if loss.adapts:
                raise UserError(f"loss {section.name}: adaptive is for answers of many tokens; leave it out")
            if loss.on_drawn_only or loss.needs_shared_tokens:
                raise UserError(f"loss {section.name} compares tokens, and classifiers have none; leave it out")
            terms.append(Term(name, loss, section.weight))
    return terms


def open_sources(sections: Sequence[Any], key: str) -> list[LabelledImages]:
    """Open a configuration's sources of labelled images; ``key`` says where they are in it, for messages."""
    try:
        return [open_images(**section.model_dump(exclude={"weight"}, exclude_none=True)) for section in sections]
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def load_models(config: ClassifierConfig, classes: Sequence[str]) -> tuple[Classifier | None, Classifier]:
    """Load the teacher, if there is one, and the student.

    Args:
        config: the run.
        classes: the data's, for a model without class names of its own.
    """
    teacher = None if config.teacher is None else load_model(config.teacher, classes, "teacher")
    # After the teacher, so that a student starts from the same weights with and without one.
    torch.manual_seed(config.training.seed)
    student = load_model(config.student, classes, "student")
    return teacher, student.freeze_all_but_head() if config.student.train == "head" else student


class PairedClasses(NamedTuple):
    """The classes of the data and of the teacher in the student's order.

    Attributes:
        label_maps: for each source the student's class of each of its labels; ``None`` where they are the same.
        teacher_order: int64 ``[C]``, the teacher's output for each of the student's; ``None`` where they are the same.
        notes: remarks on the models and on how classes were matched.
    """

    label_maps: list[list[int] | None]
    teacher_order: Tensor | None
    notes: list[str]


def pair_classes(sources: Sequence[LabelledImages], student: Classifier, teacher: Classifier | None) -> PairedClasses:
    """Match the classes of each source and of the teacher with the student's.

    Raises:
        UserError: they cannot be matched.
    """
    notes = [f"student: {note}" for note in student.notes]
    if teacher is not None:
        notes += [f"teacher: {note}" for note in teacher.notes]
    label_maps, order = [], None
    for source in sources:
        mapped = map_classes(
            student.classes,
            None if teacher is None else teacher.classes,
            source.classes,
            student_outputs=student.num_classes,
            teacher_outputs=None if teacher is None else teacher.num_classes,
        )
        label_maps.append(None if mapped.labels is None else mapped.labels.tolist())
        order = mapped.teacher_index
        notes += mapped.notes
    return PairedClasses(label_maps, order, list(dict.fromkeys(notes)))


def load_model(section: ClassifierSection, classes: Sequence[str], role: str) -> Classifier:
    """Load a section's classifier; one without weights gets an output for each of the data's classes."""
    outputs = section.num_classes
    fresh = not (section.pretrained or section.weights or Path(section.name).is_dir())
    if fresh and section.source == "timm" and outputs is None:
        outputs = len(classes)
    names = list(classes) if section.classes is None and outputs == len(classes) else section.classes
    try:
        return load_section(section.model_copy(update={"num_classes": outputs, "classes": names}))
    except UserError as error:
        raise UserError(f"{role}: {error}") from None


@loss_mistakes()
def prepare_losses(terms: Sequence[AnyTerm], student: Classifier, teacher: Classifier | None) -> None:
    """Create the losses' own parameters, from the number of classes and the features' shapes.

    Raises:
        UserError: a classifier lacks a feature that a loss reads.
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
