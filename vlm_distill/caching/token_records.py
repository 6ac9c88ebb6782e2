"""Token records: a teacher's outputs at the supervised tokens of every sample, so that a run needs no teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Encoded, Origin, SampleId
from data.errors import BadSample, UserError

from .record_files import RecordFiles, RecordWriter
from .store import read_about

FORMAT = 2
# The stored values of one position, by name: dtype and width.
Fields = Mapping[str, tuple[torch.dtype, int]]

_ENTRY = np.dtype(
    [
        ("sample", "<i8"),
        ("offset", "<i8"),
        ("tokens", "<i4"),
        ("length", "<i4"),
        ("digest", "<u8"),
        ("check", "<u4"),
        ("kind", "<u4"),
    ]
)
# The keys that cache.json must have.
_SHAPE = {"format": int | str, "sources": dict[str, int], "max_length": int, "fields": dict[str, list[str | int]]}
# Kinds of records: a sample without or with the spans of its tokens, and one that the teacher could not take.
_PLAIN, _WITH_SPANS, _LEFT_OUT = range(3)


def bytes_a_token(fields: Fields) -> int:
    """Return the bytes of a position's values. A token takes 5 more (17 with spans), a sample 40."""
    return sum(dtype.itemsize * width for dtype, width in fields.values())


class TokenCache:
    """Named values ``[tokens, width]`` of each sample's supervised tokens.

    Each record also holds the teacher's tokens of the sample, cut to the supervised ones and the token before each run
    of them, so that the student's tokens can be aligned without the teacher's processor. The files are those of
    :class:`~vlm_distill.caching.record_files.RecordFiles`.

    Args:
        folder: of a cache.

    Attributes:
        about: the content of ``cache.json``.
        sources: the number of samples of each of the data's sources, in the order in which samples are numbered.
        max_length: the most tokens of a sample; longer documents were cut into pieces of that length.

    Raises:
        UserError: there is no cache, or one of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = read_about(folder, _SHAPE)
        if self.about["format"] != FORMAT:
            raise UserError(f"{folder}: no cache of this version; name another folder, or delete it to fill it again")
        self.sources: dict[str, int] = self.about["sources"]
        self.max_length: int = self.about["max_length"]
        self.fields = {name: (getattr(torch, dtype), width) for name, (dtype, width) in self.about["fields"].items()}
        self._first = [0, *accumulate(self.sources.values())]
        self._files = RecordFiles(folder, _ENTRY, self._sizes)
        self._by_sample = self._index()

    @staticmethod
    def describe(sources: Mapping[str, int], max_length: int, fields: Fields) -> dict[str, Any]:
        """Return the part of ``cache.json`` that this class reads."""
        plain = {name: [str(dtype).removeprefix("torch."), width] for name, (dtype, width) in fields.items()}
        return {"format": FORMAT, "sources": dict(sources), "max_length": max_length, "fields": plain}

    def _index(self) -> Any:
        """Return the number of each sample's entry, −1 for none; of several entries, one that has values."""
        entries = self._files.entries
        known = np.flatnonzero((entries["sample"] >= 0) & (entries["sample"] < self._first[-1]))
        known = known[np.argsort(entries["kind"][known] != _LEFT_OUT, kind="stable")]
        by_sample = np.full(self._first[-1], -1, np.int64)
        by_sample[entries["sample"][known]] = known
        return by_sample

    def _sizes(self, entries: Any) -> Any:
        """Return the number of bytes of the entries' data."""
        lengths, tokens = entries["length"].astype(np.int64), entries["tokens"].astype(np.int64)
        spans = 12 * (entries["kind"] == _WITH_SPANS)
        own = 5 * lengths + (bytes_a_token(self.fields) + spans) * tokens
        return np.where(entries["kind"] == _LEFT_OUT, lengths, own)

    def missing(self, *, left_out: bool = False) -> list[int]:
        """Return the numbers of samples that have no record; with ``left_out`` also those that have no values."""
        there = self._by_sample >= 0
        if left_out:
            there[there] = self._files.entries["kind"][self._by_sample[there]] != _LEFT_OUT
        return np.flatnonzero(~there).tolist()

    @property
    def tokens(self) -> int:
        """The number of stored positions."""
        return int(self._files.entries["tokens"][self._by_sample[self._by_sample >= 0]].sum())

    def sample_id(self, number: int) -> SampleId:
        """Return the source and index of a sample, given its number through all sources."""
        source = int(np.searchsorted(self._first, number, side="right")) - 1
        return source, number - self._first[source]

    def number(self, sample_id: SampleId) -> int:
        """Return a sample's number through all sources."""
        source, index = sample_id
        return self._first[source] + index

    def _entry(self, sample_id: SampleId) -> int:
        """Return the number of a sample's entry."""
        entry = int(self._by_sample[self.number(sample_id)])
        if entry < 0:
            raise UserError(f"{self._name(sample_id)} is not in {self.folder}; run vlm-distill cache to fill it")
        return entry

    def read(self, sample_id: SampleId, digest: int) -> Encoded:
        """Return the teacher's tokens of a sample, cut to what aligning its supervised tokens needs.

        Reads and checks the whole record: called by a worker, it brings the values into memory ahead of use.

        Args:
            sample_id: which sample.
            digest: its present content (:func:`~vlm_distill.caching.sample_digests.sample_digest`).

        Raises:
            BadSample: the teacher could not take it.
            UserError: it is missing or damaged, or its content has changed since the cache was filled.
        """
        number = self._entry(sample_id)
        entry, data = self._files.entries[number], self._files.checked(number)
        if int(entry["digest"]) != digest:
            raise UserError(
                f"{self._name(sample_id)}: not the sample that the teacher saw when {self.folder} was filled: its "
                "text or an image has changed since; delete that folder to fill it again"
            )
        if entry["kind"] == _LEFT_OUT:
            raise BadSample(*json.loads(data.tobytes()))

        length, tokens = int(entry["length"]), int(entry["tokens"])
        ids = torch.from_numpy(np.frombuffer(data[: 4 * length].tobytes(), "<i4").astype(np.int64))
        marks = torch.from_numpy(data[4 * length : 5 * length].copy())
        spans = None
        if entry["kind"] == _WITH_SPANS:
            raw = data[5 * length : 5 * length + 12 * tokens].tobytes()
            spans = torch.from_numpy(np.frombuffer(raw, "<i4").reshape(-1, 3).astype(np.int64))
        return Encoded(ids, marks > 0, marks > 1, spans=spans)

    def values(self, origins: Sequence[Origin], *, pinned: bool = False) -> dict[str, Tensor]:
        """Return the stored values of samples, or parts of samples, concatenated: ``[tokens, width]`` by name."""
        total = sum(origin.tokens for origin in origins)
        found = {
            name: torch.empty(total, width, dtype=dtype, pin_memory=pinned)
            for name, (dtype, width) in self.fields.items()
        }
        done = 0
        for origin in origins:
            number = self._entry(origin.sample_id)
            entry, data = self._files.entries[number], self._files.data(number)
            tokens, start = int(entry["tokens"]), origin.start
            offset = 5 * int(entry["length"]) + (12 * tokens if entry["kind"] == _WITH_SPANS else 0)
            for name, (dtype, width) in self.fields.items():
                size = dtype.itemsize * width
                part = data[offset + start * size : offset + (start + origin.tokens) * size]
                found[name].view(torch.uint8)[done : done + origin.tokens].numpy()[:] = part.reshape(-1, size)
                offset += tokens * size
            done += origin.tokens
        return found

    def _name(self, sample_id: SampleId) -> str:
        """Return a sample's name in messages."""
        source, index = sample_id
        return f"{list(self.sources)[source]}, sample {index + 1}"


class TokenWriter:
    """Writes one process's part of a cache. Call ``close``, or its last samples are lost.

    Args:
        cache: the cache to add to. It does not see new records until it is opened again.
    """

    def __init__(self, cache: TokenCache) -> None:
        self._cache, self._records = cache, RecordWriter(cache.folder, _ENTRY)

    def write(self, sample_id: SampleId, digest: int, encoded: Encoded, values: Mapping[str, Tensor]) -> None:
        """Write a sample's record.

        Args:
            encoded: the teacher's tokens, as :func:`data.encoding.compact` returns them.
            values: ``[tokens, width]`` by name, for its supervised tokens in order.
        """
        marks = encoded.supervised.to(torch.uint8) + encoded.ends.to(torch.uint8)
        parts = [encoded.input_ids.to(torch.int32), marks]
        kind = _PLAIN
        if encoded.spans is not None:
            kind = _WITH_SPANS
            parts.append(encoded.spans.to(torch.int32))
        parts += [values[name].to("cpu", dtype).contiguous() for name, (dtype, _) in self._cache.fields.items()]
        data = b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts)
        tokens, length = int(encoded.supervised.sum()), len(encoded.input_ids)
        self._append(sample_id, data, tokens=tokens, length=length, digest=digest, kind=kind)

    def leave_out(self, sample_id: SampleId, digest: int, bad: BadSample) -> None:
        """Note that the teacher could not take a sample. ``digest`` is 0 if the sample could not be read."""
        data = json.dumps([bad.reason, bad.detail]).encode()
        self._append(sample_id, data, tokens=0, length=len(data), digest=digest, kind=_LEFT_OUT)

    def _append(self, sample_id: SampleId, data: bytes, **fields: int) -> None:
        self._records.append(data, sample=self._cache.number(sample_id), **fields)

    def flush(self) -> None:
        """Write all records to the disk."""
        self._records.flush()

    def close(self) -> None:
        self._records.close()
