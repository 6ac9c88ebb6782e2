"""Check that a token cache is complete and fits a run: same teacher, same settings, same data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.errors import UserError
from data.plain_text import TextSource
from data.sources import Source
from vlm_distill.config.model_sections import CacheSection, TeacherSection
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.common import DTYPES
from vlm_distill.models.fingerprint import digest_text, fingerprint
from vlm_distill.models.teacher import Teacher
from vlm_distill.models.tokenizer import read_template

from .store import check_not_filling, compare, read_about

# Parts of the identity that are read from the teacher's files.
_OF_FILES = ("weights", "configuration", "tokenizer", "image processor")


def cache_sections(config: RunConfig) -> tuple[TeacherSection, CacheSection]:
    """Return the teacher's section and that of its cache."""
    assert config.teacher is not None
    assert config.teacher.cache is not None
    return config.teacher, config.teacher.cache


def token_identity(config: RunConfig, sources: Sequence[Source | TextSource]) -> dict[str, str]:
    """Return everything except the samples that determines a cache's content, each a short text by its name.

    Parts that come from files of the teacher which are not on this machine are left out.
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
    if teacher.view is not None:
        found["view"] = json.dumps(teacher.view.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return {
        "form": f"topk {cache.k}" if cache.form == "topk" else cache.form,
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
    """Compare a cache's identity. Return which of the teacher's files could not be compared.

    Raises:
        UserError: something differs.
    """
    found = read_about(folder).get("identity", {})
    unknown = [key for key in _OF_FILES if key in found and key not in wanted]
    compare(folder, "contents", {key: value for key, value in found.items() if key not in unknown}, wanted)
    return unknown


def check_tokens(config: RunConfig, sources: Sequence[Source | TextSource], teacher: Teacher) -> list[str]:
    """Check the cache that a run is to learn from. Return remarks to show.

    Raises:
        UserError: it has another identity, is incomplete, or its probabilities are over another vocabulary.
    """
    cache, remarks = teacher.cache, list[str]()
    assert cache is not None
    assert teacher.head is not None
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
            f"teacher.cache: {cache.folder} holds probabilities over {stored:,} tokens, but this student is compared "
            f"on {compared:,}; use form hidden, or name another folder"
        )
    if config.evaluation.teacher and (config.data.eval or config.evaluation.benchmarks):
        remarks.append("the teacher is not evaluated: with teacher.cache it is never loaded")
    return remarks


def check_top_k(section: CacheSection, vocabulary: int) -> None:
    """Raise ``UserError`` if the k likeliest tokens are the whole vocabulary."""
    if section.form == "topk" and section.k >= vocabulary:
        raise UserError(f"teacher.cache.k: {section.k} of {vocabulary:,} tokens; choose fewer, or form hidden")
