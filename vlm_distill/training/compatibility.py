"""Whether student, teacher, losses and data fit each other, and what of them is cut or divided to make them fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from data.conversation import Conversation
from data.encoding import encode_pair
from data.errors import BadSample, UserError
from vlm_distill.config.sections import RunConfig, SourceSection
from vlm_distill.losses import FeatureTerm, Term
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.packing_trial import keeps_samples_apart
from vlm_distill.models.processor import Processor
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.models.teacher import Teacher
from vlm_distill.models.vocabulary import same_tokens

from .terms import AnyTerm


def pair_vocabularies(
    config: RunConfig, student: VisionLanguageModel, teacher: Teacher, terms: Sequence[AnyTerm]
) -> bool:
    """Cut both heads to the tokens that are compared. Return whether groups of tokens are, not single ones.

    Groups are compared if the tokenizers differ; each head is then cut to its own tokenizer's tokens.

    Raises:
        UserError: the tokenizers differ, and a loss compares single tokens, or a source's answers are placeholders.
    """
    try:
        teacher.align(student)
    except UserError as error:
        if teacher.likeliest:
            raise
        learning = [term for term in terms if "teacher" in term.loss.needs]
        others = [term.name for term in learning if not _spans_tokenizers(term)]
        if others:
            raise UserError(
                f"{error}, or learn from this teacher by uld, alm or overlap_kl alone, without {', '.join(others)}"
            ) from None
        unlabelled = [source.path for source in config.data.train if not source.labelled]
        reading = [term.name for term in learning if isinstance(term, Term)]
        if reading and unlabelled:
            raise UserError(
                f"loss {reading[0]} reads the answers where tokenizers differ, and {unlabelled[0]} is not "
                "labelled; leave one out"
            ) from None
        teacher.separate(student)
        return bool(learning)
    return False


def pair_several(
    configs: Mapping[str, RunConfig],
    student: VisionLanguageModel,
    teachers: Mapping[str, Teacher],
    terms: Sequence[AnyTerm],
) -> dict[str, bool]:
    """Cut the heads to the tokens that all models share. Return for each teacher whether groups are compared.

    Args:
        configs: the run with each teacher alone.
        student, teachers, terms: of the run.

    Raises:
        UserError: as :func:`pair_vocabularies`; or a loss compares more than answers, with a single teacher; or
            distributions over different vocabularies should be mixed.
    """
    for term in terms:
        reason = _why_single(term)
        if reason is not None:
            raise UserError(f"loss {term.name} compares with a single teacher: {reason}; leave it or teachers out")
    grouped, shared = {}, {}
    for name, teacher in teachers.items():
        grouped[name] = pair_vocabularies(configs[name], student, teacher, terms)
        shared[name] = student.head.vocabulary
        sources = [source for source in configs[name].data.train if source.combine != "losses"]
        if sources and (grouped[name] or teacher.likeliest is not None):
            known = "another tokenizer" if grouped[name] else "its likeliest tokens alone"
            raise UserError(
                f"data.train: {sources[0].path} combines {sources[0].combine}, but the teacher {name} gives {known}; "
                "combine losses"
            )
    least = min(number for number in shared.values() if number is not None)
    student.head.vocabulary = least
    for name, teacher in teachers.items():
        if not grouped[name]:
            teacher.limit(least)
    return grouped


def _why_single(term: AnyTerm) -> str | None:
    """Return why a loss can learn from a single teacher alone; ``None`` if it can learn from several."""
    if isinstance(term, FeatureTerm):
        return "its projections have the size of one teacher's features"
    if term.on == "images":
        return "image tokens are paired with those of one teacher"
    if term.loss.adapts:
        return "adaptive weighs an answer by one teacher's probability of it"
    if "teacher" in term.loss.needs and term.loss.needs_shared_tokens:
        return "the tokens that it compares are those in one teacher's vocabulary"
    return None


def _spans_tokenizers(term: AnyTerm) -> bool:
    """Return whether a loss can learn from a teacher with another tokenizer."""
    if isinstance(term, Term):
        return term.loss.takes_groups and term.on == "text"
    return term.loss.spans_tokenizers and term.match != "hungarian"


def check_packing(
    sections: Sequence[SourceSection],
    student: VisionLanguageModel | None,
    teacher: VisionLanguageModel | None,
    grouped: bool,
) -> None:
    """Raise ``UserError`` if a source is plain text and a model cannot keep packed documents apart."""
    text = next((section.path for section in sections if section.format == "text"), None)
    if text is None:
        return
    if grouped:
        raise UserError(f"{text}: plain text needs a student with the teacher's tokenizer (student.tokenizer: teacher)")
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None and (model.processor.has_vision or not keeps_samples_apart(model)):
            raise UserError(
                f"{text}: the {role} cannot keep documents in one row apart; plain text needs language models whose "
                "layers are attention alone and that make their masks by position, such as Llama, Qwen2 or GPT-NeoX"
            )


def check_precision(config: RunConfig, student: VisionLanguageModel, teacher: VisionLanguageModel | None) -> None:
    """Raise ``UserError`` if DeepSpeed would cast batch norm's weights to bf16: torch cannot run it with them."""
    stage = config.deepspeed.stage
    if config.training.dtype == "bf16" and stage > 0 and _has_batch_norm(student):
        raise UserError(
            f"training.dtype: the student's batch norm does not run in bf16 at deepspeed.stage {stage}; "
            "set stage: 0, or dtype: fp32"
        )
    section = config.teacher
    if teacher is None or section is None or section.placement == "replicate":
        return
    if (section.dtype or config.training.dtype) == "bf16" and _has_batch_norm(teacher):
        raise UserError(
            f"teacher.placement: batch norm does not run in bf16 with placement {section.placement}; "
            "set placement: replicate, or teacher.dtype: fp32"
        )


def _has_batch_norm(model: VisionLanguageModel) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def check_evaluations(config: RunConfig, student: VisionLanguageModel, teachers: Sequence[VisionLanguageModel]) -> None:
    """Raise ``UserError`` if student and teachers cannot be measured as the evaluation section asks."""
    if "kl" in config.evaluation.measures:
        (teacher,) = teachers
        if not same_tokens(student.processor.tokenizer, teacher.processor.tokenizer):
            raise UserError("evaluation.measures: kl needs a student with the teacher's tokenizer; leave it out")
    check_packing(config.data.eval, student, None, False)
    for teacher in teachers:
        check_packing(config.data.eval, None, teacher, False)


def divide_sequences(
    config: RunConfig,
    ranks: SequenceParallel,
    student: VisionLanguageModel,
    teacher: VisionLanguageModel | None,
    terms: Sequence[AnyTerm],
    grouped: bool,
) -> None:
    """Shard both models' decoders over the tokens of each sample. All ranks of the group call it.

    Raises:
        UserError: something needs whole sequences, or a decoder cannot be divided.
    """
    if grouped or any(isinstance(term, FeatureTerm) for term in terms):
        raise UserError(
            "training.sequence_parallel: losses on features and across tokenizers need whole sequences; leave them or "
            "it out"
        )
    text = next((source.path for source in config.data.train if source.format == "text"), None)
    packed = text or ("data.packing" if config.data.packing else None)
    if packed is not None:
        raise UserError(f"training.sequence_parallel: {packed}: rows are packed, and a divided one has one sample")
    ranks.divide(student, "student", config.data.max_length)
    if teacher is not None:
        ranks.divide(teacher, "teacher", config.data.max_length)


def template_remarks(student: Processor, teacher: Processor | None, max_length: int) -> list[str]:
    """Return what the chat templates decide about what is learned, one line each.

    Args:
        student: the student's processor.
        teacher: the teacher's, if single tokens are compared and it is here.
        max_length: the most tokens in a row.
    """
    remarks = []
    frame = student.frame
    if frame.answer_prefix:
        use = "learned" if student.learn_answer_prefix else "part of the prompt"
        remarks.append(
            f"the student's template writes {frame.answer_prefix!r} before a plain answer: {use} (data.template_text)"
        )
    if not frame.closed:
        remarks.append(
            "the student's template writes no end token: where to stop is not learned; set student.chat_template"
        )
    if teacher is not None and _differ_beside_answers(student, teacher, max_length):
        remarks.append(
            "the two templates write different text beside an answer: tokens that hold some of it are learned from the "
            "data alone (cross_entropy), the rest from the teacher"
        )
    return remarks


def _differ_beside_answers(student: Processor, teacher: Processor, max_length: int) -> bool:
    """Return whether some of an answer's own tokens differ between the models, by encoding an example."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "What is it?"), ("assistant", "It is a red circle."))
    ]
    try:
        pair = encode_pair(Conversation(tuple(messages)), [], student, teacher, max_length)
    except BadSample:  # the template needs more than text; real samples report it
        return False
    return not bool(pair.distilled[~pair.student.ends[pair.student_tokens]].all())
