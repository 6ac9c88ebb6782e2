"""A teacher's outputs at the supervised tokens of every sample, on disk, so that a run needs nothing else of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.batch import Encoded, ModelInputs, Origin
from data.conversation import Conversation, Document
from data.errors import BadSample, UserError

from .store import Shards, ShardWriter, read_about

FORMAT = 2
# What is stored of a position by name: dtype and width.
Fields = Mapping[str, tuple[torch.dtype, int]]

_ENTRY = np.dtype(
    [
        ("row", "<i8"),
        ("offset", "<i8"),
        ("tokens", "<i4"),
        ("length", "<i4"),
        ("digest", "<u8"),
        ("check", "<u4"),
        ("kind", "<u4"),
    ]
)
# What cache.json has to say.
_SHAPE = {"format": int | str, "sources": dict[str, int], "max_length": int, "fields": dict[str, list[str | int]]}
# Kinds of entries: a sample with or without its tokens' places in the answers; one that the teacher could not take.
_PLAIN, _PLACED, _LEFT_OUT = range(3)


def bytes_a_token(fields: Fields) -> int:
    """What a position takes by itself. Its row takes 5 bytes a token more, 17 with places, and 40 a sample."""
    return sum(dtype.itemsize * width for dtype, width in fields.values())


def digest_of(sample: Conversation | Document, images: Sequence[Image.Image]) -> int:
    """64 bits of a sample's content: its messages and its images' decoded pixels, or its text."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(sample, Document):
        digest.update(json.dumps([sample.text, sample.last]).encode())
    else:
        digest.update(json.dumps([sample.messages, sample.tools], sort_keys=True).encode())
    return _seen(digest, images)


def image_digest(images: Sequence[Image.Image]) -> int:
    """64 bits of images' decoded pixels."""
    return _seen(hashlib.blake2b(digest_size=8), images)


def _seen(digest: Any, images: Sequence[Image.Image]) -> int:
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little")


class TokenCache:
    """Named values ``[tokens, width]`` of each sample's supervised tokens, in as many files as there were writers.

    A writer appends to two files of its own: ``NAME.data``, the samples one after the other, and ``NAME.index``, which
    says where each of them is. A sample's entry is written after its data have reached the disk; an entry that is cut
    off, or whose data are, does not count. The data are memory-mapped. With each sample stands the teacher's row, cut
    to the supervised tokens and the token before each run of them, so that nothing of the teacher is needed to align
    the student's tokens with it. ``cache.json`` says what everything is of.

    Args:
        folder: of a cache.

    Attributes:
        about: what ``cache.json`` says.
        sources: names of the data's sources and their numbers of rows, in the order in which rows are numbered through.
        max_length: the most tokens in a row; long documents were cut into pieces of that length.

    Raises:
        UserError: there is no cache, or one of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = read_about(folder, _SHAPE)
        if self.about["format"] != FORMAT:
            raise UserError(f"{folder}: no cache of this version; name another folder, or delete it to fill it anew")
        self.sources: dict[str, int] = self.about["sources"]
        self.max_length: int = self.about["max_length"]
        self.fields = {name: (getattr(torch, dtype), width) for name, (dtype, width) in self.about["fields"].items()}
        self._first = [0, *accumulate(self.sources.values())]
        self._read_index()

    @staticmethod
    def describe(sources: Mapping[str, int], max_length: int, fields: Fields) -> dict[str, Any]:
        """The part of ``cache.json`` that this class reads."""
        plain = {name: [str(dtype).removeprefix("torch."), width] for name, (dtype, width) in fields.items()}
        return {"format": FORMAT, "sources": dict(sources), "max_length": max_length, "fields": plain}

    def _read_index(self) -> None:
        """Entry by row; where there are several, one with values."""
        self._shards = Shards(self.folder, _ENTRY, self._sizes)
        entries = self._shards.entries
        known = np.flatnonzero((entries["row"] >= 0) & (entries["row"] < self._first[-1]))
        known = known[np.argsort(entries["kind"][known] != _LEFT_OUT, kind="stable")]
        self._by_row = np.full(self._first[-1], -1, np.int64)
        self._by_row[entries["row"][known]] = known

    def _sizes(self, entries: Any) -> Any:
        """Bytes of samples' data."""
        lengths, tokens = entries["length"].astype(np.int64), entries["tokens"].astype(np.int64)
        own = 5 * lengths + (bytes_a_token(self.fields) + 12 * (entries["kind"] == _PLACED)) * tokens
        return np.where(entries["kind"] == _LEFT_OUT, lengths, own)

    def missing(self, *, left_out: bool = False) -> list[int]:
        """Rows, numbered through all sources, that are not there; with ``left_out`` also those that had no values."""
        there = self._by_row >= 0
        if left_out:
            there[there] = self._shards.entries["kind"][self._by_row[there]] != _LEFT_OUT
        return np.flatnonzero(~there).tolist()

    @property
    def tokens(self) -> int:
        """Positions that are there."""
        return int(self._shards.entries["tokens"][self._by_row[self._by_row >= 0]].sum())

    def place(self, number: int) -> tuple[int, int]:
        """Source and row of a row numbered through all sources."""
        source = int(np.searchsorted(self._first, number, side="right")) - 1
        return source, number - self._first[source]

    def _number(self, source: int, row: int) -> int:
        """Which entry is a row's."""
        number = int(self._by_row[self._first[source] + row])
        if number < 0:
            raise UserError(f"{self._where(source, row)} is not in {self.folder}; run vlm-distill cache to fill it")
        return number

    def row(self, source: int, row: int, digest: int) -> Encoded:
        """The teacher's row of a sample, cut to what its supervised tokens need.

        Reads all that is stored of the sample: where a worker does, the values lie in memory when they are asked for.

        Args:
            source, row: the sample's.
            digest: of its content as it is now.

        Raises:
            BadSample: the teacher could not take it.
            UserError: it is not there, is damaged, or was another when the teacher saw it.
        """
        number = self._number(source, row)
        entry, data = self._shards.entries[number], self._shards.checked(number)
        if int(entry["digest"]) != digest:
            raise UserError(
                f"{self._where(source, row)}: not the sample that the teacher saw when {self.folder} was filled: its "
                "text or an image has changed since; delete that folder to fill it anew"
            )
        if entry["kind"] == _LEFT_OUT:
            raise BadSample(*json.loads(data.tobytes()))
        length, tokens = int(entry["length"]), int(entry["tokens"])
        marks = torch.from_numpy(data[4 * length : 5 * length].copy())
        places = None
        if entry["kind"] == _PLACED:
            raw = data[5 * length : 5 * length + 12 * tokens].tobytes()
            places = torch.from_numpy(np.frombuffer(raw, "<i4").reshape(-1, 3).astype(np.int64))
        ids = torch.from_numpy(np.frombuffer(data[: 4 * length].tobytes(), "<i4").astype(np.int64))
        return Encoded(ids, marks > 0, marks > 1, places=places)

    def values(self, origins: Sequence[Origin], *, pinned: bool = False) -> dict[str, Tensor]:
        """What is stored of some samples, or pieces of documents, one after the other, ``[tokens, width]`` by name."""
        total = sum(origin.tokens for origin in origins)
        found = {
            name: torch.empty(total, width, dtype=dtype, pin_memory=pinned)
            for name, (dtype, width) in self.fields.items()
        }
        done = 0
        for origin in origins:
            number = self._number(origin.source, origin.row)
            entry, data = self._shards.entries[number], self._shards.data(number)
            tokens, start = int(entry["tokens"]), origin.start
            offset = 5 * int(entry["length"]) + (12 * tokens if entry["kind"] == _PLACED else 0)
            for name, (dtype, width) in self.fields.items():
                size = dtype.itemsize * width
                part = data[offset + start * size : offset + (start + origin.tokens) * size]
                found[name].view(torch.uint8)[done : done + origin.tokens].numpy()[:] = part.reshape(-1, size)
                offset += tokens * size
            done += origin.tokens
        return found

    def _where(self, source: int, row: int) -> str:
        return f"{list(self.sources)[source]}, row {row + 1}"


class TokenWriter:
    """One process's part of a cache. ``close`` it, so that its last samples are there.

    Args:
        cache: what it is added to; does not see it until opened again.
    """

    def __init__(self, cache: TokenCache) -> None:
        self._cache, self._shard = cache, ShardWriter(cache.folder, _ENTRY)

    def write(self, source: int, row: int, digest: int, encoded: Encoded, values: Mapping[str, Tensor]) -> None:
        """Keeps a sample.

        Args:
            encoded: the teacher's row as :func:`compact` gives it.
            values: ``[tokens, width]`` by name, of its supervised tokens in order.
        """
        marks = encoded.supervised.to(torch.uint8) + encoded.ends.to(torch.uint8)
        parts = [encoded.input_ids.to(torch.int32), marks]
        parts += [] if encoded.places is None else [encoded.places.to(torch.int32)]
        parts += [values[name].to("cpu", dtype).contiguous() for name, (dtype, _) in self._cache.fields.items()]
        data = b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts)
        kind = _PLAIN if encoded.places is None else _PLACED
        self._append(source, row, int(encoded.supervised.sum()), len(encoded.input_ids), digest, kind, data)

    def leave_out(self, source: int, row: int, digest: int, bad: BadSample) -> None:
        """Notes that the teacher could not take a sample; ``digest`` is 0 where it could not be read."""
        data = json.dumps([bad.reason, bad.detail]).encode()
        self._append(source, row, 0, len(data), digest, _LEFT_OUT, data)

    def _append(self, source: int, row: int, tokens: int, length: int, digest: int, kind: int, data: bytes) -> None:
        number = self._cache._first[source] + row
        self._shard.append(data, row=number, tokens=tokens, length=length, digest=digest, kind=kind)

    def flush(self) -> None:
        """Brings what was written to the disk."""
        self._shard.flush()

    def close(self) -> None:
        self._shard.close()


def compact(row: Encoded) -> Encoded:
    """A row cut to its supervised tokens and the token before each run of them."""
    before = torch.cat([row.supervised[1:], torch.tensor([False])])
    kept = row.supervised | before
    return Encoded(row.input_ids[kept], row.supervised[kept], row.ends[kept], places=row.places)


class CachedRows:
    """What stands for a teacher's processor where its outputs are cached.

    Args:
        cache: of the teacher's outputs.
        tokenizer: the teacher's.
    """

    has_vision = False
    one_row = False

    def __init__(self, cache: TokenCache, tokenizer: Any) -> None:
        self.cache, self.tokenizer = cache, tokenizer

    def at(self, source: int, row: int) -> CachedRow:
        """What encodes this one sample."""
        return CachedRow(self.cache, self.tokenizer, source, row)

    def encode(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        raise NotImplementedError("cached rows are found by source and row; see at")

    def encode_document(self, document: Document) -> Encoded:
        raise NotImplementedError("cached rows are found by source and row; see at")

    def dummy(self) -> Encoded:
        nothing = torch.zeros(1, dtype=torch.bool)
        return Encoded(torch.zeros(1, dtype=torch.int64), nothing, nothing)

    def join(self, samples: Sequence[Encoded]) -> Encoded:
        raise NotImplementedError("cached rows are not packed: they are short, and stand in the samples' order")

    def collate(self, samples: Sequence[Encoded]) -> ModelInputs:
        """Ids, and ``predicts``: at which places a hidden state is stored; both ``[B, L]``."""
        length = max(len(sample.input_ids) for sample in samples)
        ids = torch.zeros(len(samples), length, dtype=torch.int64)
        predicts = torch.zeros(len(samples), length, dtype=torch.bool)
        for number, sample in enumerate(samples):
            ids[number, : len(sample.input_ids)] = sample.input_ids
            predicts[number, : len(sample.input_ids) - 1] = sample.supervised[1:]
        return ModelInputs(input_ids=ids, predicts=predicts)


class CachedRow(CachedRows):
    """One sample's."""

    def __init__(self, cache: TokenCache, tokenizer: Any, source: int, row: int) -> None:
        super().__init__(cache, tokenizer)
        self._place = source, row

    def encode(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        return self.cache.row(*self._place, digest_of(conversation, images))

    def encode_document(self, document: Document) -> Encoded:
        return self.cache.row(*self._place, digest_of(document, ()))

    def answer(self, number: int, conversation: Conversation, images: Sequence[Image.Image]) -> CachedAnswer:
        """What encodes one answer of a conversation whose answers are samples of their own."""
        row = self.encode(conversation, images)
        own = (~row.supervised).cumsum(0) - 1 == number  # before each answer stands one token
        places = None if row.places is None else row.places[own[row.supervised]]
        answer = Encoded(row.input_ids[own], row.supervised[own], row.ends[own], places=places)
        return CachedAnswer(self.cache, self.tokenizer, answer)


class CachedAnswer(CachedRows):
    """One answer of a sample."""

    def __init__(self, cache: TokenCache, tokenizer: Any, row: Encoded) -> None:
        super().__init__(cache, tokenizer)
        self._row = row

    def encode(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        return self._row
