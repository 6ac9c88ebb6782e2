"""Whether a cache of a teacher's outputs is the one that a run needs: its contents, and that it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.errors import UserError
from data.sources import Source, TextSource
from vlm_distill.config.model_sections import CacheSection, TeacherSection
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.common import DTYPES
from vlm_distill.models.fingerprint import digest_text, fingerprint
from vlm_distill.models.teacher import Teacher
from vlm_distill.models.tokenizer import read_template

from .store import check_not_filling, compare, read_about

_OF_FILES = ("weights", "configuration", "tokenizer", "image processor")


def cache_sections(config: RunConfig) -> tuple[TeacherSection, CacheSection]:
    """The teacher and its cache."""
    assert config.teacher is not None
    assert config.teacher.cache is not None
    return config.teacher, config.teacher.cache


def identity(config: RunConfig, sources: Sequence[Source | TextSource]) -> dict[str, str]:
    """Everything that decides a cache's content beside the samples themselves, each a short text by its name.

    What the teacher's files would say and are not here is left out.
    """
    teacher, cache = cache_sections(config)
    assert teacher.path is not None
    data = config.data
    found = fingerprint(teacher.path)
    if teacher.tokenizer is not None:
        found["tokenizer"] = fingerprint(teacher.tokenizer).get("tokenizer", teacher.tokenizer)
    if teacher.chat_template is not None:
        found["chat template"] = digest_text(read_template(teacher.chat_template))
    if teacher.template_arguments:
        found["template arguments"] = json.dumps(teacher.template_arguments, sort_keys=True, default=str)
    if teacher.image:
        found["image sizes"] = json.dumps(teacher.image, sort_keys=True, default=str)
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


def compare_contents(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """What of the teacher's files could not be compared. Raises ``UserError`` where something differs."""
    found = read_about(folder).get("identity", {})
    unknown = [key for key in _OF_FILES if key in found and key not in wanted]
    compare(folder, "contents", {k: v for k, v in found.items() if k not in unknown}, wanted)
    return unknown


def check_cache(config: RunConfig, sources: Sequence[Source | TextSource], teacher: Teacher) -> list[str]:
    """Remarks on a cache that a run is to learn from.

    Raises:
        UserError: it is of something else, not whole, or of likeliest tokens among others than the run compares.
    """
    cache, remarks = teacher.cache, list[str]()
    assert cache is not None
    assert teacher.head is not None
    unknown = compare_contents(cache.folder, identity(config, sources))
    if unknown:
        remarks.append(f"the teacher's {', '.join(unknown)} cannot be compared with the cache's: no such files here")
    missing = len(cache.missing())
    if missing:
        check_not_filling(cache.folder, "teacher.cache")
        raise UserError(
            f"teacher.cache: {cache.folder} holds {sum(cache.sources.values()) - missing:,} of "
            f"{sum(cache.sources.values()):,} rows; fill it: vlm-distill cache CONFIG"
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


def check_likeliest(section: CacheSection, vocabulary: int) -> None:
    """Raises ``UserError`` where no token would be left beside the likeliest."""
    if section.form == "topk" and section.k >= vocabulary:
        raise UserError(f"teacher.cache.k: {section.k} of {vocabulary:,} tokens; choose fewer, or form hidden")
