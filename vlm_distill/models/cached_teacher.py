"""A teacher whose outputs are read from a cache, and what the cache stores of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.batch import DistillationBatch
from vlm_distill.caching.cached_processor import CachedProcessor
from vlm_distill.caching.token_records import Fields, TokenCache
from vlm_distill.losses import HiddenTargets, TokenTargets, TopKTargets

from .interface import VisionLanguageModel
from .lm_head import LMHead, fixed_head
from .teacher import Teacher, TeacherOutputs
from .tokenizer import load_tokenizer
from .vocabulary import align_heads, separate_heads

_HEAD, _TOKENIZER = "head.safetensors", "tokenizer"
# Tokens whose logits are computed at a time.
_ROWS = 512


class CachedTeacher(Teacher):
    """A teacher whose outputs are on disk; only its tokenizer and, for hidden states, its head are loaded.

    Args:
        folder: a cache made by ``vlm-distill cache``.
        device: the head's device.
        trust_remote_code: run code that comes with the tokenizer.

    Attributes:
        head: without hidden states it has width 0 and only says how large the vocabulary is.
    """

    processor: CachedProcessor
    cache: TokenCache
    head: LMHead

    def __init__(self, folder: Path, device: torch.device | str, *, trust_remote_code: bool = False) -> None:
        self.cache = TokenCache(folder)
        self.processor = CachedProcessor(self.cache, load_tokenizer(str(folder / _TOKENIZER), trust_remote_code))
        about = self.cache.about["teacher"]
        self.parameters = about["parameters"]
        self._ends = set(about["end_tokens"])
        hidden = "hidden" in self.cache.fields
        if not hidden:
            self.likeliest = self.cache.fields["ids"][1] if "ids" in self.cache.fields else 0
        state = load_file(folder / _HEAD, str(device)) if hidden else {"weight": torch.empty(about["vocabulary"], 0)}
        self.head = fixed_head(state, about["scale"], about["softcap"])

    def align(self, student: VisionLanguageModel) -> int:
        return align_heads(student, self)

    def separate(self, student: VisionLanguageModel) -> None:
        separate_heads(student, self)

    @property
    def end_tokens(self) -> set[int]:
        return self._ends

    @torch.no_grad()
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        assert batch.teacher is not None
        assert not features, "a cached teacher has no features"
        device = batch.targets.device
        stored = self.cache.values(batch.origins, pinned=device.type == "cuda")
        rows = (batch.teacher.inputs["predicts"].flatten().cumsum(0) - 1)[batch.teacher.positions]
        values = {name: value.to(device, non_blocking=True)[rows] for name, value in stored.items()}
        if "hidden" in values:
            return TeacherOutputs(HiddenTargets(values["hidden"], self.head))
        if "logprob" in values:
            return TeacherOutputs(TokenTargets(values["logprob"].squeeze(-1)))
        ids = values["ids"].long()
        if values["ids"].dtype == torch.int16:
            ids &= 0xFFFF
        # Rounding moved their sum slightly away from 1.
        known = torch.cat([values["logprobs"].float(), values["tail"].float()], -1).log_softmax(-1)
        return TeacherOutputs(TopKTargets(ids, known[:, :-1], known[:, -1]))


def cached_fields(head: dict[str, Tensor] | None, k: int, vocabulary: int) -> Fields:
    """Return a cache record's fields for one token.

    With a head its hidden state, otherwise the k likeliest tokens, or with k = 0 its own log-probability. Those of
    likeliest tokens take 16 bits (docs/teachers.md has the measured error), ids 16 if the vocabulary allows.
    """
    if head is not None:
        return {"hidden": (head["weight"].dtype, head["weight"].shape[1])}
    if k == 0:
        return {"logprob": (torch.float32, 1)}
    ids = torch.int16 if vocabulary <= 2**16 else torch.int32
    return {"ids": (ids, k), "logprobs": (torch.float16, k), "tail": (torch.float32, 1)}


def cached_values(targets: HiddenTargets, tokens: Tensor, fields: Fields) -> dict[str, Tensor]:
    """Return these fields of a teacher's outputs, ``[N, width]`` by name; collective if the teacher is sharded.

    Args:
        targets: the teacher's outputs.
        tokens: int64 ``[N]``, the answers' own tokens.
        fields: as :func:`cached_fields` returns them.
    """
    if "hidden" in fields:
        return {"hidden": targets.hidden}
    head = targets.head
    assert isinstance(head, LMHead)
    with head.weight() as weight:
        whole = weight.float()
        if "logprob" in fields:
            own = [
                head.logits_with(part, whole).log_softmax(-1).gather(-1, ids.unsqueeze(-1))
                for part, ids in zip(targets.hidden.split(_ROWS), tokens.split(_ROWS), strict=True)
            ]
            return {"logprob": torch.cat(own)}
        k = fields["ids"][1]
        parts = [TopKTargets.of(head.logits_with(part, whole), k) for part in targets.hidden.split(_ROWS)]
    return {
        "ids": torch.cat([part.ids for part in parts]),
        "logprobs": torch.cat([part.logprobs for part in parts]),
        "tail": torch.cat([part.tail for part in parts]).unsqueeze(-1),
    }


def describe_teacher(teacher: Teacher, vocabulary: int) -> dict[str, Any]:
    """Return the part of ``cache.json`` that :class:`CachedTeacher` reads."""
    assert teacher.head is not None
    return {
        "parameters": teacher.parameters,
        "end_tokens": sorted(teacher.end_tokens),
        "vocabulary": vocabulary,
        "scale": teacher.head.scale,
        "softcap": teacher.head.softcap,
    }


def save_head(folder: Path, model: VisionLanguageModel, head: dict[str, Tensor] | None) -> None:
    """Write the files that :class:`CachedTeacher` loads."""
    model.processor.tokenizer.save_pretrained(folder / _TOKENIZER)
    if head is not None:
        save_file(head, folder / _HEAD)


def whole_head(head: LMHead) -> dict[str, Tensor]:
    """Return a head's weight and bias on the CPU; collective if the teacher is sharded."""
    with head.weight() as weight:
        found = {"weight": weight, "bias": head.bias}
        return {name: t.detach().cpu().clone().contiguous() for name, t in found.items() if t is not None}
