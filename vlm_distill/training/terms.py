"""The terms of a run's loss: built from the configuration, checked against it, and prepared for the models."""

from __future__ import annotations

from collections.abc import Sequence

from data.errors import UserError
from vlm_distill import losses
from vlm_distill.config.checks import check_terms
from vlm_distill.config.sections import RunConfig, TermSection
from vlm_distill.losses import BatchLoss, DistillationLoss, FeatureLoss, FeatureTerm, Term, must_be_alike, term_name
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import Teacher
from vlm_distill.models.vocabulary import shared_tokens

from .loss_mistakes import loss_mistakes

AnyTerm = Term | FeatureTerm
# The student's parts that receive gradients from a loss on one of these features of images.
_TRAINED_BY = {"vision": ("vision_encoder",), "projector": ("vision_encoder", "projector")}


@loss_mistakes()
def build_terms(config: RunConfig) -> list[AnyTerm]:
    """Build the loss's terms, named by their losses (and numbered where a loss is named twice). Imports plug-ins.

    Raises:
        UserError: a loss cannot be built, or needs what this configuration does not give.
    """
    for section in config.loss:
        losses.REGISTRY.load(section.name)
    check_terms(config)  # again, now that plug-ins are known
    terms: list[AnyTerm] = []
    for section in config.loss:
        loss = losses.build(section.name, **(section.model_extra or {}))
        if isinstance(loss, BatchLoss):
            raise UserError(f"loss {section.name} compares the images of a batch, for classifiers; leave it out")
        _check_loss(config, section.name, loss)
        _check_sequences(config, section, loss)
        _check_drawn(config, section, loss)
        if section.on == "images":
            _check_on_images(section.name, loss)
        name = term_name(section.name, [term.name for term in terms])
        if isinstance(loss, FeatureLoss):
            terms.append(FeatureTerm(name, loss, section.weight, section.answers, section.match))
        else:
            means = section.on, section.answers, section.mean
            terms.append(Term(name, loss, section.weight, *means, match=section.match))
    if must_be_alike(terms):
        _check_teacher_sees(config, terms)
    for teacher in config.all_teachers.values():
        if teacher.view is not None and teacher.view.images == "none":
            _check_sees_images(terms)
        if teacher.cache is not None:
            _check_cached(terms, teacher.cache.form, config.training.recompute_logits)
    return terms


def acts_on(term: AnyTerm, *, drawn: bool) -> bool:
    """Return whether a term acts on answers that the student has drawn, or on the data's.

    Drawn answers are not known to be right, so that losses that read right answers leave them out.
    """
    if drawn:
        return term.answers != "data" and "targets" not in term.loss.needs
    return term.answers != "own"


def unit_of(term: AnyTerm) -> str:
    """Return what a term's mean is over, as :meth:`~data.batch.Step.counts` names it."""
    if isinstance(term, FeatureTerm) and term.loss.unit != "token":
        return "images" if term.loss.unit == "image" else "image_samples"
    by_sample = isinstance(term, Term) and term.mean == "sequences"
    if isinstance(term, Term) and term.on == "images":
        if by_sample:
            return "image_samples"
        return "image_tokens" if term.match == "none" else "matched_tokens"
    unit = "distilled" if "teacher" in term.loss.needs else "supervised"
    return f"{unit}_samples" if by_sample else unit


def _check_on_images(name: str, loss: DistillationLoss | FeatureLoss) -> None:
    """Raise ``UserError`` if a loss cannot compare two models' logits at image tokens."""
    if isinstance(loss, FeatureLoss):
        raise UserError(f"loss {name}: on is for losses on logits; leave it out")
    if "targets" in loss.needs or loss.takes_tokens:
        raise UserError(f"loss {name} reads the right tokens, and images have none; leave on: images out")
    if "teacher" not in loss.needs:
        raise UserError(f"loss {name} learns from no teacher, and images have nothing else; leave on: images out")


def _check_sequences(config: RunConfig, section: TermSection, loss: DistillationLoss | FeatureLoss) -> None:
    """Raise ``UserError`` if a term shall treat each answer as a whole, and cannot."""
    if isinstance(loss, FeatureLoss):
        if section.mean != "tokens":
            raise UserError(f"loss {section.name}: mean is for losses on logits; leave it out")
        return
    if not loss.adapts:
        return
    if section.on == "images":
        raise UserError(f"loss {section.name}: adaptive compares answers; leave it or on: images out")
    if config.training.sequence_parallel > 1:
        raise UserError(
            f"loss {section.name}: adaptive needs an answer whole on one rank; leave it or "
            "training.sequence_parallel out"
        )


def _check_drawn(config: RunConfig, section: TermSection, loss: DistillationLoss | FeatureLoss) -> None:
    """Raise ``UserError`` if a loss that only drawn answers give a meaning shall act on the data's."""
    if isinstance(loss, FeatureLoss) or not loss.on_drawn_only or section.answers == "own":
        return
    policy = config.on_policy
    if policy is None or policy.fraction < 1 or policy.pairs:
        raise UserError(
            f"loss {section.name} estimates from answers that the student drew itself; set answers: own for it, and a "
            "section on_policy"
        )


def _check_teacher_sees(config: RunConfig, terms: Sequence[AnyTerm]) -> None:
    """Raise ``UserError`` if the teacher's outputs at image tokens are neither computed nor stored."""
    name = next(term.name for term in terms if must_be_alike([term]))
    for section in config.all_teachers.values():
        if section.cache is not None:
            raise UserError(f"loss {name}: a cache holds nothing at image tokens; leave teacher.cache out")
        if section.server is not None and section.server.form != "hidden":
            raise UserError(
                f"loss {name}: a server returns nothing at image tokens unless it is asked for hidden states; set "
                "teacher.server.form to hidden, or load the teacher by path"
            )


def _check_sees_images(terms: Sequence[AnyTerm]) -> None:
    """Raise ``UserError`` if a loss compares what two models make of images."""
    for term in terms:
        if must_be_alike([term]) or (isinstance(term, FeatureTerm) and term.loss.unit != "token"):
            raise UserError(f"loss {term.name} compares images, and teacher.view.images is none; leave one of them out")


def _check_loss(config: RunConfig, name: str, loss: DistillationLoss | FeatureLoss) -> None:
    """Raise ``UserError`` if a loss needs what this configuration does not give."""
    whole_rows = isinstance(loss, DistillationLoss) and loss.kernel_form() is None
    if config.training.recompute_logits and whole_rows:
        raise UserError(f"loss {name} needs whole rows of logits; leave it or training.recompute_logits out")
    for source in config.data.train:
        reads_targets = "targets" in loss.needs
        if isinstance(loss, DistillationLoss):
            reads_targets = reads_targets or (loss.takes_tokens and not loss.on_drawn_only) or loss.adapts
        if reads_targets and not source.labelled:
            raise UserError(f"loss {name} reads the answers, and {source.path} is not labelled; leave one out")
    for teacher in config.all_teachers.values():
        if teacher.server is not None and "teacher" in loss.needs:
            _check_served(name, loss, teacher.server.form)


def _check_served(name: str, loss: DistillationLoss | FeatureLoss, form: str) -> None:
    """Raise ``UserError`` if a loss needs more of the teacher than a server is asked for."""
    if isinstance(loss, FeatureLoss):
        raise UserError(
            f"loss {name} compares features from inside the teacher, which no server returns; load the teacher by path"
        )
    if form == "hidden":
        return
    takes_topk, takes_tokens = loss.takes_topk, loss.takes_tokens
    if form == "topk" and takes_tokens:
        raise UserError(f"loss {name} needs the answers' own log-probabilities; set teacher.server.form to token")
    if form == "topk" and not takes_topk:
        raise UserError(
            f"loss {name} needs more than the likeliest tokens; set teacher.server.form to hidden, or choose a "
            "divergence at temperature 1, such as forward_kl"
        )
    if form == "token" and not takes_tokens:
        raise UserError(
            f"loss {name} needs more of the teacher than the answers' own log-probabilities; "
            f"set teacher.server.form to {'topk' if takes_topk else 'hidden'}"
        )


def _check_cached(terms: Sequence[AnyTerm], form: str, recompute: bool) -> None:
    """Raise ``UserError`` if a loss needs more of the teacher than a cache of this form holds."""
    for term in terms:
        if isinstance(term, FeatureTerm):
            raise UserError(f"loss {term.name}: no cache holds a teacher's features; leave it or teacher.cache out")
        if form == "hidden" or "teacher" not in term.loss.needs:
            continue
        if form == "token" and not term.loss.takes_tokens:
            raise UserError(
                f"loss {term.name} needs more of the teacher than the answers' own log-probabilities; set "
                "teacher.cache.form to hidden"
            )
        if form == "topk" and not term.loss.takes_topk:
            enough = "token" if term.loss.takes_tokens else "hidden"
            raise UserError(
                f"loss {term.name}: the likeliest tokens are not enough; set teacher.cache.form to {enough}"
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
        if must_be_alike([term]):
            assert teacher is not None
            _check_sees(term.name, student, teacher)
        if isinstance(term, Term):
            term.loss.prepare(vocabulary)
            if term.mean == "sequences" and term.loss.learned_tensors():
                raise UserError(f"loss {term.name}: learns from all tokens alike; leave mean: sequences out")
            if term.loss.needs_shared_tokens:
                assert teacher is not None
                assert teacher.head is not None
                most = vocabulary, teacher.head.vocabulary or vocabulary
                tokenizers = student.processor.tokenizer, teacher.processor.tokenizer
                term.loss.share_tokens(*shared_tokens(*tokenizers, most))
            continue
        assert teacher is not None
        assert teacher.model is not None
        student_shapes = _shapes(term, "student", student, term.loss.student_features)
        teacher_shapes = _shapes(term, "teacher", teacher.model, term.loss.teacher_features)
        _check_trains(term, student)
        term.loss.prepare(student_shapes, teacher_shapes)


def _check_sees(name: str, student: VisionLanguageModel, teacher: Teacher) -> None:
    """Raise ``UserError`` if one of the models sees no images."""
    for role, processor in (("student", student.processor), ("teacher", teacher.processor)):
        if not processor.has_vision:
            raise UserError(f"loss {name}: the {role} sees no images; choose a model with a vision encoder")


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
