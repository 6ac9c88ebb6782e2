"""The terms of a run's loss: built from the configuration, checked against it, and prepared for the models."""

from __future__ import annotations

from collections.abc import Sequence

from data.errors import UserError
from vlm_distill import losses
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import DistillationLoss, FeatureLoss, FeatureTerm, Term
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import Teacher

from .loss_mistakes import loss_mistakes

AnyTerm = Term | FeatureTerm
# The student's parts that receive gradients from a loss on one of these features of images.
_TRAINED_BY = {"vision": ("vision_encoder",), "projector": ("vision_encoder", "projector")}


@loss_mistakes()
def build_terms(config: RunConfig) -> list[AnyTerm]:
    """Build the loss's terms, named by their losses (and numbered where a loss is named twice).

    Raises:
        UserError: a loss cannot be built, or needs what this configuration does not give.
    """
    terms: list[AnyTerm] = []
    for section in config.loss:
        loss = losses.build(section.name, **(section.model_extra or {}))
        _check_loss(config, section.name, loss)
        taken = [term.name for term in terms]
        name = section.name if section.name not in taken else f"{section.name}_{len(taken) + 1}"
        if isinstance(loss, FeatureLoss):
            terms.append(FeatureTerm(name, loss, section.weight))
        else:
            terms.append(Term(name, loss, section.weight))
    if config.teacher is not None and config.teacher.cache is not None:
        _check_cached(terms, config.teacher.cache.form, config.training.recompute_logits)
    return terms


def _check_loss(config: RunConfig, name: str, loss: DistillationLoss | FeatureLoss) -> None:
    """Raise ``UserError`` if a loss needs what this configuration does not give."""
    whole_rows = isinstance(loss, DistillationLoss) and loss.kernel_form() is None
    if config.training.recompute_logits and whole_rows:
        raise UserError(f"loss {name} needs whole rows of logits; leave it or training.recompute_logits out")
    for source in config.data.train:
        if "targets" in loss.needs and not source.labelled:
            raise UserError(f"loss {name} reads the answers, and {source.path} is not labelled; leave one out")
    served = config.teacher is not None and config.teacher.server is not None
    if served and "teacher" in loss.needs and not (isinstance(loss, DistillationLoss) and loss.takes_topk):
        raise UserError(
            f"loss {name} needs more than the likeliest tokens, which are all that a teacher on a server "
            "returns; choose a divergence at temperature 1, such as forward_kl"
        )


def _check_cached(terms: Sequence[AnyTerm], form: str, recompute: bool) -> None:
    """Raise ``UserError`` if a loss needs more of the teacher than a cache of this form holds."""
    for term in terms:
        if isinstance(term, FeatureTerm):
            raise UserError(f"loss {term.name}: no cache holds a teacher's features; leave it or teacher.cache out")
        if form != "topk" or "teacher" not in term.loss.needs:
            continue
        if not term.loss.takes_topk:
            raise UserError(
                f"loss {term.name} needs the teacher's whole distribution; set teacher.cache.form to hidden"
            )
        if recompute:
            raise UserError("training.recompute_logits needs hidden states; set teacher.cache.form to hidden")


@loss_mistakes()
def prepare_losses(terms: Sequence[AnyTerm], student: VisionLanguageModel, teacher: Teacher | None) -> None:
    """Give the losses the vocabulary and the features' shapes, so that their own parameters exist before training.

    Args:
        terms: of the loss.
        student: with its head cut to the tokens that are compared, and with the trained parts marked.
        teacher: what the losses learn from; losses on features need one that runs here.

    Raises:
        UserError: a model does not have a feature that a loss reads, the two cannot be compared, or nothing would be
            trained by the comparison.
    """
    with student.head.weight() as weight:
        vocabulary = len(weight)
    for term in terms:
        if isinstance(term, Term):
            term.loss.prepare(vocabulary)
            continue
        assert teacher is not None
        assert teacher.model is not None
        student_shapes = _shapes(term, "student", student, term.loss.student_features)
        teacher_shapes = _shapes(term, "teacher", teacher.model, term.loss.teacher_features)
        _check_trains(term, student)
        term.loss.prepare(student_shapes, teacher_shapes)


def _shapes(
    term: FeatureTerm, role: str, model: VisionLanguageModel, names: Sequence[str]
) -> dict[str, tuple[int | None, int]]:
    """Return the shapes of a model's features by name."""
    try:
        return {name: model.feature_shape(name) for name in names}
    except UserError as error:
        raise UserError(f"loss {term.name}: {role}: {error}") from None


def _check_trains(term: FeatureTerm, student: VisionLanguageModel) -> None:
    """Raise ``UserError`` if every parameter behind a loss on images is frozen."""
    for parts in (_TRAINED_BY[name] for name in term.loss.student_features if name in _TRAINED_BY):
        behind = [student.parts[part] for part in parts if part in student.parts]
        if not any(p.requires_grad for part in behind for p in part.parameters()):
            names = " and ".join(parts)
            raise UserError(f"loss {term.name}: it pulls at the {names}, which student.train freezes")
