"""The processor of a cached teacher: finds the teacher's tokens of a sample in the cache instead of encoding it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.batch import Encoded, ModelInputs, RecordedProcessor, RecordedSample, SampleId
from data.conversation import Conversation, Document

from .sample_digests import sample_digest
from .token_records import TokenCache


class CachedProcessor(RecordedProcessor):
    """Stands in for a teacher's processor where its outputs are cached.

    Args:
        cache: the teacher's outputs.
        tokenizer: the teacher's.
    """

    has_vision = takes_videos = False
    one_row = False

    def __init__(self, cache: TokenCache, tokenizer: Any) -> None:
        self.cache, self.tokenizer = cache, tokenizer

    def at(self, sample_id: SampleId) -> CachedSample:
        return CachedSample(self.cache, self.tokenizer, sample_id)

    def encode(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        raise NotImplementedError("cached samples are found by source and index; see at")

    def encode_document(self, document: Document) -> Encoded:
        raise NotImplementedError("cached samples are found by source and index; see at")

    def dummy(self) -> Encoded:
        nothing = torch.zeros(1, dtype=torch.bool)
        return Encoded(torch.zeros(1, dtype=torch.int64), nothing, nothing)

    def image_tokens(self, sample: Encoded) -> Tensor:
        return torch.zeros_like(sample.supervised)

    def image_blocks(self, sample: Encoded) -> list[int]:
        return []

    def join(self, samples: Sequence[Encoded]) -> Encoded:
        raise NotImplementedError("cached samples are not packed: they are short, and keep the pairs' order")

    def collate(self, samples: Sequence[Encoded]) -> ModelInputs:
        """Return ids, and ``predicts``: the positions for which outputs are stored; both ``[B, L]``."""
        length = max(len(sample.input_ids) for sample in samples)
        ids = torch.zeros(len(samples), length, dtype=torch.int64)
        predicts = torch.zeros(len(samples), length, dtype=torch.bool)
        for number, sample in enumerate(samples):
            ids[number, : len(sample.input_ids)] = sample.input_ids
            predicts[number, : len(sample.input_ids) - 1] = sample.supervised[1:]
        return ModelInputs(input_ids=ids, predicts=predicts)


class CachedSample(CachedProcessor, RecordedSample):
    """Finds one sample."""

    def __init__(self, cache: TokenCache, tokenizer: Any, sample_id: SampleId) -> None:
        super().__init__(cache, tokenizer)
        self._sample_id = sample_id

    def encode(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        return self.cache.read(self._sample_id, sample_digest(conversation, images))

    def encode_document(self, document: Document) -> Encoded:
        return self.cache.read(self._sample_id, sample_digest(document, ()))

    def answer(self, number: int, conversation: Conversation, images: Sequence[Image.Image]) -> CachedAnswer:
        whole = self.encode(conversation, images)
        own = (~whole.supervised).cumsum(0) - 1 == number  # one token precedes each answer
        spans = None if whole.spans is None else whole.spans[own[whole.supervised]]
        answer = Encoded(whole.input_ids[own], whole.supervised[own], whole.ends[own], spans=spans)
        return CachedAnswer(self.cache, self.tokenizer, answer)


class CachedAnswer(CachedProcessor):
    """Returns one answer of a sample."""

    def __init__(self, cache: TokenCache, tokenizer: Any, answer: Encoded) -> None:
        super().__init__(cache, tokenizer)
        self._answer = answer

    def encode(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        return self._answer
