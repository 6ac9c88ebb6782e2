"""From a configuration to the parts of a run: sources, losses, teacher and student, and how a batch is split."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.conversation import Conversation, ImageSource
from data.encoding import Turns, encode_pair
from data.errors import BadSample, UserError
from data.images import load_image
from data.opening import open_source, open_text
from data.plain_text import CHARACTERS_PER_TOKEN, TextSource
from data.sources import Source
from vlm_distill import losses, models
from vlm_distill.caching.cached_processor import CachedProcessor
from vlm_distill.caching.store import ABOUT, check_not_filling
from vlm_distill.config.sections import (
    TEACHERS,
    CacheSection,
    DataSection,
    ModelSection,
    RunConfig,
    ServerSection,
    SourceSection,
    TeacherSection,
)
from vlm_distill.endpoint import Endpoint
from vlm_distill.losses import DistillationLoss, FeatureLoss, FeatureTerm, Term
from vlm_distill.models.common import DTYPES
from vlm_distill.models.composed import ComposedVLM, load_tokenizer, read_template
from vlm_distill.models.initialise import keep_layers
from vlm_distill.models.interface import Processor, VisionLanguageModel
from vlm_distill.models.lora import WithoutAdapters, add_lora, save_adapter
from vlm_distill.models.quantize import keep_gradients, quantization
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.models.served import KEY_VARIABLE, ServedModel, ServedTeacher
from vlm_distill.models.teacher import CachedTeacher, ModelTeacher, Teacher
from vlm_distill.models.vocabulary import Teaching, align_heads, same_tokens, separate_heads

from .engine import Processes, load_sharded
from .loss_mistakes import loss_mistakes


@loss_mistakes()
def build_terms(config: RunConfig) -> list[Term | FeatureTerm]:
    """The loss's terms, named by their losses (and numbered where one loss stands twice)."""
    terms: list[Term | FeatureTerm] = []
    for section in config.loss:
        loss = losses.build(section.name, **(section.model_extra or {}))
        if "teacher" in loss.needs and config.teacher is None:
            raise UserError(f"loss {section.name} needs a teacher; add a teacher section or use cross_entropy alone")
        whole_rows = isinstance(loss, DistillationLoss) and loss.streamed() is None
        if config.training.recompute_logits and whole_rows:
            raise UserError(
                f"loss {section.name} needs whole rows of logits; leave it or training.recompute_logits out"
            )
        for source in config.data.train:
            if "targets" in loss.needs and not source.labelled:
                raise UserError(
                    f"loss {section.name} reads the answers, and {source.path} is not labelled; leave one out"
                )
        served = config.teacher is not None and config.teacher.server is not None
        if served and "teacher" in loss.needs and not (isinstance(loss, DistillationLoss) and loss.takes_topk):
            raise UserError(
                f"loss {section.name} needs more than the likeliest tokens, which are all that a teacher on a server "
                "tells; choose a divergence at temperature 1, such as forward_kl"
            )
        taken = [term.name for term in terms]
        name = section.name if section.name not in taken else f"{section.name}_{len(taken) + 1}"
        if isinstance(loss, FeatureLoss):
            terms.append(FeatureTerm(name, loss, section.weight))
        else:
            terms.append(Term(name, loss, section.weight))
    if config.teacher is not None and config.teacher.cache is not None:
        _check_cached(terms, config.teacher.cache.form, config.training.recompute_logits)
    return terms


def _check_cached(terms: Sequence[Term | FeatureTerm], form: str, recompute: bool) -> None:
    """Raises ``UserError`` where a loss needs more of the teacher than a cache of this form holds."""
    for term in terms:
        if isinstance(term, FeatureTerm):
            raise UserError(f"loss {term.name}: no cache holds a teacher's features; leave it or teacher.cache out")
        if form == "topk" and "teacher" in term.loss.needs:
            if not term.loss.takes_topk:
                raise UserError(
                    f"loss {term.name} needs the teacher's whole distribution; set teacher.cache.form to hidden"
                )
            if recompute:
                raise UserError("training.recompute_logits needs hidden states; set teacher.cache.form to hidden")


# Which of a student's parts a loss on images pulls at.
_BEHIND = {"vision": ("vision_encoder",), "projector": ("vision_encoder", "projector")}


@loss_mistakes()
def prepare_losses(terms: Sequence[Term | FeatureTerm], student: VisionLanguageModel, teacher: Teacher | None) -> None:
    """Tells the losses the models' vocabulary and features, so that what they learn themselves exists before training.

    Raises:
        UserError: a model cannot give what a loss reads, the two cannot be compared, or nothing would learn from it.
    """
    with student.head.weight() as weight:
        vocabulary = len(weight)
    for term in terms:
        if isinstance(term, Term):
            term.loss.prepare(vocabulary)
            continue
        assert isinstance(teacher, ModelTeacher)
        mine, others = term.loss.student_features, term.loss.teacher_features
        shapes = []
        for role, model, names in (("student", student, mine), ("teacher", teacher.model, others)):
            try:
                shapes.append({name: model.feature_shape(name) for name in names})
            except UserError as error:
                raise UserError(f"loss {term.name}: {role}: {error}") from None
        for parts in (_BEHIND[name] for name in mine if name in _BEHIND):
            behind = [student.parts[part] for part in parts if part in student.parts]
            if not any(p.requires_grad for part in behind for p in part.parameters()):
                raise UserError(f"loss {term.name}: it pulls at the {' and '.join(parts)}, which student.train freezes")
        term.loss.prepare(*shapes)


def open_sources(sections: Sequence[SourceSection], max_length: int) -> list[Source | TextSource]:
    """The readers of a configuration's sources.

    Args:
        sections: of the configuration.
        max_length: the most tokens in a row.

    Raises:
        UserError: a source cannot be read, or two have one name, so that neither problems nor scores tell them apart.
    """
    sources: list[Source | TextSource] = []
    for section in sections:
        named = section.model_dump(include={"split", "config", "name", "limit", "columns"})
        if section.format == "text":
            sources.append(open_text(section.path, CHARACTERS_PER_TOKEN * max_length, **named))
        else:
            images = Path(section.images) if section.images else None
            sources.append(open_source(section.path, images=images, format=section.format, **named))
    name, count = Counter(source.name for source in sources).most_common(1)[0] if sources else ("", 0)
    if count > 1:
        raise UserError(f"data: {count} sources are called {name}; give each a name of its own (key name)")
    return sources


def turns(data: DataSection) -> Turns:
    """What of conversations is learnt."""
    return Turns(data.answers == "last", data.turns == "split", data.max_prompt, data.max_response)


def check_packing(
    sections: Sequence[SourceSection],
    student: VisionLanguageModel | None,
    teacher: VisionLanguageModel | None,
    grouped: bool,
) -> None:
    """Raises ``UserError`` where there is plain text and a model cannot keep documents in one row apart."""
    text = next((section.path for section in sections if section.format == "text"), None)
    if text is None:
        return
    if grouped:
        raise UserError(f"{text}: plain text needs a student with the teacher's tokenizer (student.tokenizer: teacher)")
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None and (model.processor.has_vision or not model.keeps_samples_apart()):
            raise UserError(
                f"{text}: the {role} cannot keep documents in one row apart; plain text needs language models whose "
                "layers are attention alone and that make their masks by position, such as Llama, Qwen2 or GPT-NeoX"
            )


def check_evaluations(config: RunConfig, student: VisionLanguageModel, teacher: VisionLanguageModel | None) -> None:
    """Raises ``UserError`` where something that is to be measured cannot be, of these two models."""
    if "kl" in config.evaluation.measures:
        assert teacher is not None
        if not same_tokens(student.processor.tokenizer, teacher.processor.tokenizer):
            raise UserError("evaluation.measures: kl needs a student with the teacher's tokenizer; leave it out")
    check_packing(config.data.eval, student, teacher, False)


def divide_sequences(
    config: RunConfig,
    ranks: SequenceParallel,
    student: VisionLanguageModel,
    teacher: VisionLanguageModel | None,
    terms: Sequence[Term | FeatureTerm],
    grouped: bool,
) -> None:
    """Divides both models' decoders among ranks that share their samples. All ranks of the group call it.

    Raises:
        UserError: something would look at a whole sequence, or a decoder cannot be divided.
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


def image_loader(data: DataSection) -> Callable[[ImageSource], Image.Image]:
    """Decodes images as the run's data section allows."""
    return partial(load_image, roots=[Path(root) for root in data.roots], max_pixels=data.max_pixels)


def load_model(
    section: ModelSection, dtype: torch.dtype, tokenizer: Any = None, quantize: Any = None
) -> VisionLanguageModel:
    """A model by its section: loaded from a path, or assembled from parts.

    Args:
        section: the student's or the teacher's.
        dtype: of the parameters.
        tokenizer: for an assembled model whose section names none.
        quantize: what ``models.quantize.quantization`` gives, to load weights in fewer bits.
    """
    common = section.model_dump(include={"attn_implementation", "trust_remote_code", "chat_template"})
    if section.tokenizer == TEACHERS:
        section = section.model_copy(update={"tokenizer": None})
    if quantize is not None:
        common["quantize"] = quantize
    if section.tokenizer is not None:
        tokenizer = load_tokenizer(section.tokenizer, section.trust_remote_code)
    if section.path is not None:
        own = tokenizer if section.tokenizer is not None else None
        return models.load_vlm(section.path, dtype=dtype, tokenizer=own, **common)
    parts = section.model_dump(include={"vision_encoder", "projector", "decoder"}, exclude_none=True)
    return models.build_vlm({**parts, **common, "dtype": dtype}, tokenizer=tokenizer)


def load_models(config: RunConfig, processes: Processes) -> tuple[VisionLanguageModel, Teacher | None]:
    """The student, with what trains of it marked, and the teacher: wherever it runs, or what is cached of it."""
    teacher: Teacher | None
    learn_block = config.data.template_text == "learn"
    if config.teacher is not None and config.teacher.cache is not None:
        teacher = open_cached(config.teacher, config.teacher.cache, processes)
    else:
        teacher = load_teacher(config, processes)
    # After the teacher, so that a student starts from the same weights with and without one.
    torch.manual_seed(config.training.seed)
    student = load_student(config, teacher)
    if config.teacher is not None and config.teacher.from_student:
        teacher = ModelTeacher(WithoutAdapters(student))
    for processor in (student.processor, teacher.processor if teacher is not None else None):
        if isinstance(processor, Processor):
            processor.learn_block = learn_block
    return student, teacher


def open_cached(teacher: TeacherSection, section: CacheSection, processes: Processes) -> CachedTeacher:
    """A teacher's cached outputs. Raises ``UserError`` where there are none."""
    folder = Path(section.folder)
    if not (folder / ABOUT).is_file():
        check_not_filling(folder, "teacher.cache")
        raise UserError(f"teacher.cache: {folder} holds no cache; fill it: vlm-distill cache CONFIG")
    return CachedTeacher(folder, processes.device, trust_remote_code=teacher.trust_remote_code)


def load_teacher(config: RunConfig, processes: Processes) -> Teacher | None:
    """The teacher, here or on its server; ``None`` without one of its own."""
    section = config.teacher
    if section is None or section.from_student:
        return None
    if section.server is not None:
        served = open_served(section, section.server)
        length = config.data.max_length
        if served.context is not None and length >= served.context:
            raise UserError(
                f"data.max_length: {length}, but {section.server.url} takes {served.context} tokens, one of which it "
                f"must generate; set it to at most {served.context - 1}, or start the server with --max-model-len"
            )
        return ServedTeacher(served, section.server.top_logprobs, section.server.workers)
    dtype = DTYPES[section.dtype or config.training.dtype]
    if section.placement == "replicate":
        bits = None if section.quantize is None else quantization(section.quantize, dtype, "teacher")
        teacher = ModelTeacher(load_model(section, dtype, quantize=bits).to(processes.device))
    else:
        offload = section.placement == "offload"
        teacher = ModelTeacher(*load_sharded(lambda: load_model(section, dtype), dtype, processes, offload=offload))
    give_arguments(teacher.model.processor, section, "teacher")
    teacher.model.processor.learn_block = config.data.template_text == "learn"
    return teacher


def open_served(section: TeacherSection, server: ServerSection) -> ServedModel:
    """A model on its server, with tokenizer and image processing from here."""
    assert section.path is not None
    tokenizer = None
    if section.tokenizer is not None:
        tokenizer = load_tokenizer(section.tokenizer, section.trust_remote_code)
    processor = models.load_processor(
        section.path,
        trust_remote_code=section.trust_remote_code,
        tokenizer=tokenizer,
        chat_template=section.chat_template,
    )
    give_arguments(processor, section, "teacher")
    endpoint = Endpoint("teacher.server", server.url, KEY_VARIABLE, timeout=server.timeout)
    return ServedModel(processor, endpoint, server.model or section.path, section.template_arguments)


def load_student(config: RunConfig, teacher: Teacher | None) -> VisionLanguageModel:
    """The student, with what trains of it marked."""
    section = config.student
    if section.from_teacher is not None:
        assert isinstance(teacher, ModelTeacher)
        settings = dict(section.from_teacher)
        layers = settings.pop("layers", None)
        if layers is None or settings:
            raise UserError("student.from_teacher: takes layers, a number of decoder layers to keep or a list of them")
        student = keep_layers(teacher.model, layers).float()
        student.processor = copy.copy(student.processor)  # the teacher's, which keeps its own chat template
    else:
        tokenizer = teacher.processor.tokenizer if teacher is not None else None
        dtype = DTYPES[config.training.dtype]
        bits = None if section.quantize is None else quantization(section.quantize, dtype, "student")
        # Masters are float32 in any case; DeepSpeed casts the working copy.
        if section.tokenizer == TEACHERS and section.decoder is not None and section.decoder.get("name") is not None:
            tokenizer = None  # its embeddings have other rows before they take it
        student = load_model(section, torch.float32, tokenizer, bits)
        if bits is not None:
            keep_gradients(student)
        if section.tokenizer == TEACHERS:
            assert teacher is not None
            _take_tokenizer(student, teacher, section.chat_template)
    give_arguments(student.processor, section, "student")
    missing = [part for part in section.trained_whole if part not in student.parts]
    if missing and section.train is not None:
        raise UserError(f"student.train: this student has no {missing[0]}; it has {', '.join(student.parts)}")
    student.set_trainable(section.trained_whole)
    if section.lora is not None:
        add_lora(student, **section.lora.model_dump(exclude={"merge"}))
    if not trained_parameters(student):
        raise UserError("student.train: nothing is left to train")
    return student.train()


def give_arguments(processor: Processor, section: ModelSection, role: str) -> None:
    """Give a model's chat template its section's arguments. Raises ``UserError`` where it does not read one."""
    processor.set_template_arguments(section.template_arguments, f"{role}.template_arguments")


def template_remarks(
    data: DataSection, student: Processor, teacher: Processor | CachedProcessor | None, grouped: bool
) -> list[str]:
    """Say what the chat templates decide about what is learnt, a line each."""
    remarks = []
    frame = student.frame
    if frame.block:
        use = "learnt" if student.learn_block else "part of the prompt"
        remarks.append(
            f"the student's template writes {frame.block!r} before a plain answer: {use} (data.template_text)"
        )
    if not frame.closed:
        remarks.append(
            "the student's template writes no end token: where to stop is not learnt; set student.chat_template"
        )
    if isinstance(teacher, Processor) and not grouped and _differ_beside_answers(student, teacher, data.max_length):
        remarks.append(
            "the two templates write different text beside an answer: tokens that hold some of it are learnt from the "
            "data alone (cross_entropy), the rest from the teacher"
        )
    return remarks


def _differ_beside_answers(student: Processor, teacher: Processor, max_length: int) -> bool:
    """Whether some of an answer's own tokens are not the same for both models, by trying one."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "What is it?"), ("assistant", "It is a red circle."))
    ]
    try:
        pair = encode_pair(Conversation(tuple(messages)), [], student, teacher, max_length)
    except BadSample:  # a template that wants more than text; of real samples it is reported
        return False
    return not bool(pair.distilled[~pair.student.ends[pair.student_tokens]].all())


def _take_tokenizer(student: VisionLanguageModel, teacher: Teacher, chat_template: str | None) -> None:
    if not isinstance(student, ComposedVLM):
        raise UserError("student.tokenizer: teacher is for language models and models from parts, not for whole VLMs")
    student.use_tokenizer(teacher.processor.tokenizer, teacher.end_tokens)
    if chat_template is not None:
        student.processor.tokenizer.chat_template = read_template(chat_template)


def write_student(
    config: RunConfig, student: VisionLanguageModel, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes the student as a model of its own, or as an adapter where ``student.lora.merge`` is false.

    Args:
        state: the weights to write, where the student's own are sharded over ranks.
    """
    section = config.student
    if section.lora is None or section.lora.merge:
        student.save_pretrained(folder, state)
    else:
        assert section.base is not None
        save_adapter(student, folder, section.base, whole=section.trained_whole, state=state)


def pair_vocabularies(
    config: RunConfig, student: VisionLanguageModel, teacher: Teaching, terms: Sequence[Term | FeatureTerm]
) -> bool:
    """Cuts both heads to the tokens that are compared; true where groups of tokens are, the tokenizers being different.

    Raises:
        UserError: different tokenizers, and a loss that compares them token by token or answers that are placeholders.
    """
    try:
        align_heads(student, teacher)
    except UserError as error:
        learning = [term for term in terms if "teacher" in term.loss.needs]
        others = [term.name for term in learning if not _spans_tokenizers(term)]
        if others:
            raise UserError(f"{error}, or learn from this teacher by uld alone, without {', '.join(others)}") from None
        unlabelled = [source.path for source in config.data.train if not source.labelled]
        reading = [term.name for term in learning if isinstance(term, Term)]
        if reading and unlabelled:
            raise UserError(
                f"loss {reading[0]} reads the answers where tokenizers differ, and {unlabelled[0]} is not "
                "labelled; leave one out"
            ) from None
        separate_heads(student, teacher)
        return bool(learning)
    return False


def _spans_tokenizers(term: Term | FeatureTerm) -> bool:
    """Whether a loss can learn from a teacher with another tokenizer."""
    return term.loss.takes_groups if isinstance(term, Term) else term.loss.unit == "image"


def trained_parameters(model: VisionLanguageModel) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
