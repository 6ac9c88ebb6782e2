"""Check that a cache fits a run before the run reads it: same model, same settings, same data, complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from data.errors import UserError
from data.plain_text import TextSource
from data.sources import Source
from vlm_distill.config.sections import CacheSection, RunConfig, TeacherSection
from vlm_distill.models.common import DTYPES
from vlm_distill.models.composed import read_template
from vlm_distill.models.fingerprint import digest_text
from vlm_distill.models.fingerprint import fingerprint as folder_fingerprint
from vlm_distill.models.interface import Processor, VisionLanguageModel
from vlm_distill.models.teacher import CachedTeacher, Teacher

from .image_features import FeatureCache
from .store import ABOUT, check_not_filling, compare, fingerprint, read_about

# Parts of a token cache's identity that are read from the teacher's files.
_OF_FILES = ("weights", "configuration", "tokenizer", "image processor")


def cache_sections(config: RunConfig) -> tuple[TeacherSection, CacheSection]:
    """Return the teacher's section and that of its cache."""
    assert config.teacher is not None
    assert config.teacher.cache is not None
    return config.teacher, config.teacher.cache


# Tokens.


def token_identity(config: RunConfig, sources: Sequence[Source | TextSource]) -> dict[str, str]:
    """Return everything except the samples that determines a token cache's content, each a short text by its name.

    Parts that would be read from files of the teacher which are not on this machine are left out.
    """
    teacher, cache = cache_sections(config)
    assert teacher.path is not None
    data = config.data
    found = folder_fingerprint(teacher.path)
    if teacher.tokenizer is not None:
        found["tokenizer"] = folder_fingerprint(teacher.tokenizer).get("tokenizer", teacher.tokenizer)
    if teacher.chat_template is not None:
        found["chat template"] = digest_text(read_template(teacher.chat_template))
    if teacher.template_arguments:
        found["template arguments"] = json.dumps(teacher.template_arguments, sort_keys=True, default=str)
    return {
        "form": cache.form if cache.form == "hidden" else f"{cache.form} {cache.k}",
        **found,
        "dtype": str(DTYPES[teacher.dtype or config.training.dtype]).removeprefix("torch."),
        "quantize": teacher.quantize or "none",
        "data": ", ".join(f"{source.name} ({len(source)} rows)" for source in sources),
        "data.max_length": str(data.max_length),
        "data.answers": data.answers,
        "data.turns": data.turns,
        "data.template_text": data.template_text,
        "data.max_prompt": str(data.max_prompt),
        "data.max_response": str(data.max_response),
    }


def compare_tokens(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """Compare a token cache's identity. Return which of the teacher's files could not be compared.

    Raises:
        UserError: something differs.
    """
    found = read_about(folder).get("identity", {})
    unknown = [key for key in _OF_FILES if key in found and key not in wanted]
    compare(folder, "contents", {key: value for key, value in found.items() if key not in unknown}, wanted)
    return unknown


def check_tokens(config: RunConfig, sources: Sequence[Source | TextSource], teacher: CachedTeacher) -> list[str]:
    """Check a token cache that a run is to learn from. Return remarks to show.

    Raises:
        UserError: it has another identity, is incomplete, or its likeliest tokens are of another vocabulary.
    """
    cache, remarks = teacher.cache, list[str]()
    unknown = compare_tokens(cache.folder, token_identity(config, sources))
    if unknown:
        remarks.append(f"the teacher's {', '.join(unknown)} cannot be compared with the cache's: no such files here")
    missing = len(cache.missing())
    if missing:
        check_not_filling(cache.folder, "teacher.cache")
        total = sum(cache.sources.values())
        raise UserError(
            f"teacher.cache: {cache.folder} holds {total - missing:,} of {total:,} samples; "
            "fill it: vlm-distill cache CONFIG"
        )
    stored, compared = cache.about["teacher"]["vocabulary"], teacher.head.vocabulary
    if "hidden" not in cache.fields and compared != stored:
        raise UserError(
            f"teacher.cache: {cache.folder} holds the likeliest of {stored:,} tokens, and this student shares "
            f"{compared:,} with the teacher; use form hidden, or name another folder"
        )
    if config.evaluation.teacher and (config.data.eval or config.evaluation.benchmarks):
        remarks.append("the teacher is not evaluated: with teacher.cache it is never loaded")
    return remarks


def check_top_k(section: CacheSection, vocabulary: int) -> None:
    """Raise ``UserError`` if the k likeliest tokens are the whole vocabulary."""
    if section.form == "topk" and section.k >= vocabulary:
        raise UserError(f"teacher.cache.k: {section.k} of {vocabulary:,} tokens; choose fewer, or form hidden")


# Image features.


def frozen_vision(model: VisionLanguageModel) -> dict[str, nn.Module]:
    """Return the parts whose output a feature cache keeps. Raise ``UserError`` if there are none, or one is trained."""
    try:
        parts = model.sight
    except UserError as error:
        raise UserError(f"student.vision_cache: {error}; leave it out") from error
    for name, part in parts.items():
        if any(p.requires_grad for p in part.parameters()):
            raise UserError(
                f"student.vision_cache: features of this model are what its {name} gives, which trains; leave it out "
                "of student.train and lora.parts, or leave vision_cache out"
            )
    return parts


def feature_identity(config: RunConfig, model: VisionLanguageModel) -> dict[str, str]:
    """Return everything that determines the features of an image, each a short text by its name."""
    weights = {}
    for part, module in frozen_vision(model).items():
        for name, tensor in module.state_dict().items():
            weights[f"{part}.{name}"] = tensor.float()
    return {
        "vision encoder": fingerprint(weights)[:16],
        "settings": digest_text(json.dumps(model.sight_settings, sort_keys=True, default=str)),
        "dtype": config.training.dtype,
    }


def compare_features(folder: Path, identity: Mapping[str, str]) -> None:
    """Raise ``UserError`` if a feature cache has another identity."""
    compare(folder, "features", read_about(folder).get("identity", {}), identity)


def training_processors(
    config: RunConfig, student: VisionLanguageModel, teacher: Teacher | None, same_encoder: bool
) -> tuple[tuple[Any, Any], str | None]:
    """Return the student's and the teacher's processors, reading cached features if there are any, and a remark on it.

    Args:
        same_encoder: whether the teacher has the same vision encoder, so that the cache serves both.

    Raises:
        UserError: there is no cache, or it has another identity.
    """
    own, other = student.processor, None if teacher is None else teacher.processor
    if config.student.vision_cache is None:
        return (own, other), None
    folder, identity = Path(config.student.vision_cache), feature_identity(config, student)
    # Unlike a token cache, a feature cache does not know how many images it should hold.
    check_not_filling(folder, "student.vision_cache")
    if not (folder / ABOUT).is_file():
        raise UserError(f"student.vision_cache: {folder} holds no cache; fill it: vlm-distill cache CONFIG")
    cache = FeatureCache(folder)
    compare_features(folder, identity)
    if same_encoder:
        assert isinstance(other, Processor)
        other = other.with_features(cache)
    whose = "student's and the teacher's" if same_encoder else "student's"
    remark = f"the {whose} vision encoder does not run in training: {folder} holds features of {len(cache):,} images"
    return (own.with_features(cache), other), remark
