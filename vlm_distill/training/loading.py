"""Loading of student and teacher as their sections say, and writing of the student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from vlm_distill import models
from vlm_distill.caching.store import ABOUT, check_not_filling
from vlm_distill.config.model_sections import TEACHERS, CacheSection, ModelSection, ServerSection, TeacherSection
from vlm_distill.config.sections import RunConfig
from vlm_distill.endpoint_pool import open_endpoint
from vlm_distill.models.cached_teacher import CachedTeacher
from vlm_distill.models.common import DTYPES
from vlm_distill.models.composed import ComposedVLM
from vlm_distill.models.head_alone import read_head
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.lm_head import LMHead
from vlm_distill.models.lora import add_lora, save_adapter
from vlm_distill.models.processor import Processor
from vlm_distill.models.pruning import Kept, pruned
from vlm_distill.models.quantize import keep_gradients, quantization
from vlm_distill.models.served import KEY_VARIABLE, ServedModel, ServedTeacher
from vlm_distill.models.served_hidden import ServedHidden
from vlm_distill.models.taken_projector import adapted_settings, take_projector
from vlm_distill.models.teacher import ModelTeacher, Teacher
from vlm_distill.models.tokenizer import load_tokenizer, read_template
from vlm_distill.models.weightless import Weightless, weightless
from vlm_distill.runtime.processes import Processes


def load_model(
    section: ModelSection, dtype: torch.dtype | None, tokenizer: Any = None, quantize: Any = None
) -> VisionLanguageModel:
    """Load a model from a path, or assemble it from parts, as its section says.

    Args:
        section: the student's or the teacher's.
        dtype: of the parameters; ``None``: as saved.
        tokenizer: for an assembled model whose section names none.
        quantize: from ``models.quantize.quantization``, to load weights in fewer bits.
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


def load_teacher(config: RunConfig, processes: Processes | None) -> Teacher | None:
    """Load the teacher, here, on its server or from its cache; ``None`` without one of its own.

    Args:
        config: the run.
        processes: the ranks that a teacher may be sharded over; ``None``: the model itself, without weights.
    """
    section = config.teacher
    if section is None or section.from_student:
        return None
    if processes is not None and section.cache is not None:
        return open_cached(section, section.cache, processes.device)
    if section.server is None:
        return _load_here(config, processes)
    teacher: Teacher
    if section.server.form == "hidden":
        teacher = _served_hidden(config, section, section.server, "cpu" if processes is None else processes.device)
    else:
        teacher = _served_teacher(section, section.server, config.data.max_length)
    assert isinstance(teacher.processor, Processor)
    teacher.processor.learn_answer_prefix = config.data.template_text == "learn"
    return teacher


def _load_here(config: RunConfig, processes: Processes | None) -> Teacher:
    """Load the teacher to run here, whole or in shards, even if its outputs are cached."""
    section = config.teacher
    assert section is not None
    dtype = DTYPES[section.dtype or config.training.dtype]
    if processes is None or section.placement == "replicate":
        bits = None if section.quantize is None else quantization(section.quantize, dtype, "teacher")
        model = load_model(section, dtype, quantize=bits)
        teacher = ModelTeacher(model if processes is None else model.to(processes.device))
    else:
        from .engine import load_sharded  # imports DeepSpeed, which commands that only look do without

        offload = section.placement == "offload"
        teacher = ModelTeacher(*load_sharded(lambda: load_model(section, dtype), dtype, processes, offload=offload))
    set_processor(teacher.processor, section, "teacher")
    read_as_data(teacher.processor, config)
    return teacher


def open_cached(section: TeacherSection, cache: CacheSection, device: torch.device) -> CachedTeacher:
    """Open a teacher's cached outputs. Raise ``UserError`` if the folder has none."""
    folder = Path(cache.folder)
    if not (folder / ABOUT).is_file():
        check_not_filling(folder, "teacher.cache")
        raise UserError(f"teacher.cache: {folder} holds no cache; fill it: vlm-distill cache CONFIG")
    return CachedTeacher(folder, device, trust_remote_code=section.trust_remote_code)


def _served_teacher(section: TeacherSection, server: ServerSection, max_length: int) -> ServedTeacher:
    """Return the teacher on its server. Raise ``UserError`` if it takes shorter requests than the data needs."""
    served = open_served(section, server)
    if served.context is not None and max_length >= served.context:
        raise UserError(
            f"data.max_length: {max_length}, but {served.endpoint.url} takes {served.context} tokens and must "
            f"generate one of them; set it to at most {served.context - 1}, or start the server with --max-model-len"
        )
    return ServedTeacher(served, server.top_logprobs if server.form == "topk" else 0, server.workers)


def _served_hidden(
    config: RunConfig, section: TeacherSection, server: ServerSection, device: torch.device | str
) -> ServedHidden:
    """Return a teacher whose hidden states are on its server, and whose lm head is loaded here."""
    served = open_served(section, server)
    limit = config.data.max_length
    if served.context is not None and limit > served.context:
        raise UserError(
            f"data.max_length: {limit}, but {served.endpoint.url} takes {served.context} tokens; set it to at most "
            f"{served.context}, or start the server with --max-model-len"
        )
    return ServedHidden(
        served,
        _head_alone(section, device),
        server.workers,
        dtype=DTYPES[server.embed_dtype],
        longest=limit,
        at_images=any(term.on == "images" for term in config.loss),
    )


def _head_alone(section: TeacherSection, device: torch.device | str) -> LMHead:
    """Return the lm head of a teacher whose other weights stay where they are."""
    assert section.path is not None
    if weightless():
        return load_model(section, None).head
    with Weightless():
        model = load_model(section, None)
    return read_head(model, section.path, device)


def open_served(section: TeacherSection, server: ServerSection) -> ServedModel:
    """Connect to a model on a server. Its tokenizer and image processor are loaded here."""
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
    set_processor(processor, section, "teacher")
    endpoint = open_endpoint("teacher.server", server.url, KEY_VARIABLE, timeout=server.timeout)
    name = server.model or section.path
    return ServedModel(processor, endpoint, name, section.template_arguments, pools=server.form == "hidden")


def load_student(
    config: RunConfig, teacher: Teacher | None, kept: Mapping[str, Kept] | None = None
) -> VisionLanguageModel:
    """Load the student with its trained parts marked, in training mode.

    Args:
        config: the run.
        teacher: what the student may be pruned from or take its tokenizer from.
        kept: what a student that is pruned from the teacher keeps of it.
    """
    section = config.student
    if kept is not None:
        assert teacher is not None
        assert teacher.model is not None
        student = pruned(teacher.model, kept)
    else:
        student = _load_own(config, teacher)
    set_processor(student.processor, section, "student")
    read_as_data(student.processor, config)
    missing = [part for part in section.trained_whole if part not in student.parts]
    if missing and section.train is not None:
        raise UserError(f"student.train: this student has no {missing[0]}; it has {', '.join(student.parts)}")
    student.set_trainable(section.trained_whole)
    if section.lora is not None:
        add_lora(student, **section.lora.model_dump(exclude={"merge"}))
    if not trained_parameters(student):
        raise UserError("student.train: nothing is left to train")
    return student.train()


def _load_own(config: RunConfig, teacher: Teacher | None) -> VisionLanguageModel:
    """Load a student from its own path or parts, with the teacher's tokenizer if its section says so."""
    section = config.student
    tokenizer = teacher.processor.tokenizer if teacher is not None else None
    dtype = DTYPES[config.training.dtype]
    bits = None if section.quantize is None else quantization(section.quantize, dtype, "student")
    if section.decoder is not None and section.decoder.get("name") is not None:
        tokenizer = None  # a pretrained decoder has its own; the teacher's may have more tokens than its embeddings
    takes = section.projector is not None and section.projector.get("type") == TEACHERS
    if takes:
        assert section.projector is not None
        settings = adapted_settings(_loaded(teacher), section.projector)
        section = section.model_copy(update={"projector": settings})
    # Master weights are always float32; DeepSpeed casts the working copy.
    student = load_model(section, torch.float32, tokenizer, bits)
    if takes:
        take_projector(student, _loaded(teacher))
    if bits is not None:
        keep_gradients(student)
    if section.tokenizer == TEACHERS:
        assert teacher is not None
        _take_tokenizer(student, teacher, section.chat_template)
    return student


def _loaded(teacher: Teacher | None) -> VisionLanguageModel:
    """Return the teacher's model, which the configuration's checks have made sure of."""
    assert teacher is not None
    assert teacher.model is not None
    return teacher.model


def _take_tokenizer(student: VisionLanguageModel, teacher: Teacher, chat_template: str | None) -> None:
    """Give the student the teacher's tokenizer."""
    if not isinstance(student, ComposedVLM):
        raise UserError("student.tokenizer: teacher is for language models and models from parts, not for whole VLMs")
    student.use_tokenizer(teacher.processor.tokenizer, teacher.end_tokens)
    if chat_template is not None:
        student.processor.tokenizer.chat_template = read_template(chat_template)


def set_processor(processor: Processor, section: ModelSection, role: str) -> None:
    """Give a model's chat template and image processor what its section sets of them.

    Raises:
        UserError: an argument that the template does not read, or a size that the image processor does not take.
    """
    processor.set_template_arguments(section.template_arguments, f"{role}.template_arguments")
    processor.set_image_sizes(section.image, f"{role}.image")


def read_as_data(processor: Processor, config: RunConfig) -> None:
    """Let a processor read samples as the data section says."""
    processor.learn_answer_prefix = config.data.template_text == "learn"
    processor.video_frames = None if config.data.video is None else config.data.video.max_frames


def trained_parameters(model: VisionLanguageModel) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def write_student(
    config: RunConfig, student: VisionLanguageModel, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the student as a model of its own, or as an adapter if ``student.lora.merge`` is false.

    Args:
        config: the run.
        student: the student.
        folder: to write to.
        state: the weights to write if the student's own are sharded over ranks.
    """
    section = config.student
    if section.lora is None or section.lora.merge:
        student.save_pretrained(folder, state)
    else:
        assert section.base is not None
        save_adapter(student, folder, section.base, whole=section.trained_whole, state=state)
