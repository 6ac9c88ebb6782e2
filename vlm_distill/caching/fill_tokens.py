"""Fill a cache with a teacher's outputs at the supervised tokens of all samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import DistillationBatch, Encoded, Problem, SampleId, Step
from data.collate import Collator, add_origins
from data.encoding import Pair, encode_teacher
from data.errors import BadSample, UserError
from data.loader import ProblemLog, problem_of
from data.plain_text import TextSource
from data.sample_images import load_images
from data.sources import Source
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import HiddenTargets
from vlm_distill.models.cached_teacher import cached_fields, cached_values, describe_teacher, save_head, whole_head
from vlm_distill.models.processor import Processor
from vlm_distill.models.teacher import Teacher
from vlm_distill.run import Run
from vlm_distill.runtime.processes import Processes
from vlm_distill.training.compatibility import check_packing
from vlm_distill.training.open_data import teacher_view, turns

from .check_tokens import cache_sections, check_top_k, compare_tokens, token_identity
from .fill_loop import Filling, SampleBatches, say
from .sample_digests import sample_digest
from .store import ABOUT, check_room, in_words, make_folder, read_about
from .token_records import TokenCache, TokenWriter, bytes_a_token

WHAT = "the teacher's outputs"
# Samples from which the total size is estimated, and micro-batches within which samples are sorted by length.
_MEASURED, _WINDOW = 32, 64


@dataclass
class _Sample:
    """A sample on its way into the cache: its encoding, or why it has none."""

    sample_id: SampleId
    digest: int = 0
    encoded: Encoded | None = None
    bad: BadSample | None = None


@dataclass
class _Batch:
    """A micro-batch for the teacher, and its samples, bad ones included."""

    batch: DistillationBatch
    samples: list[_Sample]


class _TeacherSteps(SampleBatches[Step]):
    """Micro-batches for a teacher alone, one a step."""

    def __init__(
        self,
        run: Run,
        processor: Processor,
        sample_ids: Sequence[Sequence[SampleId]],
    ) -> None:
        super().__init__(sample_ids)
        data = run.config.data
        self.sources, self.load, self.processor = run.sources, run.load_image, processor
        self.max_length, self.turns, self.on_bad = data.max_length, turns(data), data.bad_samples
        self.view = teacher_view(run.config.teacher)
        self.collator = Collator(processor, None, data.max_length)

    def __getitem__(self, number: int) -> Step:
        pairs: list[Pair] = []
        samples: list[_Sample] = []
        step = Step(number, [])
        for source, index in self.sample_ids[number]:
            sample = _Sample((source, index))
            samples.append(sample)
            try:
                pairs += self.read(sample)
            except BadSample as bad:
                step.problems.append(problem_of(self.sources[source], index, bad, self.on_bad))
                sample.bad = bad
        step.batches.append(_Batch(self.collator.batch(pairs), samples))
        return step

    def read(self, sample: _Sample) -> list[Pair]:
        """Return a sample's pairs, and note its digest and encoding."""
        source, index = sample.sample_id
        content, images = load_images(self.sources[source][index], self.load)
        sample.digest = sample_digest(content, images)
        rest = self.processor, self.max_length, self.turns, self.view
        pairs, sample.encoded = encode_teacher(content, images, *rest)
        return add_origins(pairs, sample.sample_id)


class TokenFilling(Filling[Step]):
    """Runs the teacher over all samples of all sources that are not in its cache yet, and stores its outputs.

    Raises:
        UserError: (by ``prepare``) the cache has another identity, or the disk is too small; (by ``write``) a sample is
            bad and ``data.bad_samples`` is ``fail``.
    """

    key = "teacher.cache"

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        self.section = cache_sections(config)[1]
        self.folder = Path(self.section.folder)
        self.run = Run(config, processes)
        self.problems: list[Problem] = []

    def prepare(self) -> _TeacherSteps | None:
        config, processes = self.config, self.processes
        _ = self.run.terms  # checks them
        sources = self.run.sources
        identity = token_identity(config, sources)
        if (self.folder / ABOUT).exists():
            compare_tokens(self.folder, identity)
            if not TokenCache(self.folder).missing():
                if processes.first:
                    say(f"{self.folder} is complete: {TokenCache(self.folder).tokens:,} tokens")
                return None

        teacher = self.run.uncached.teacher
        assert teacher is not None
        assert teacher.model is not None  # one on a server has no cache
        check_packing(config.data.train, None, teacher.model, False)
        self.teacher: Teacher = teacher
        self._open(identity)
        self.cache = TokenCache(self.folder)
        self.writer = TokenWriter(self.cache)

        batches = _TeacherSteps(self.run, teacher.model.processor, self._missing(sources))
        missing = sum(map(len, batches.sample_ids))
        if processes.first:
            _estimate(self.cache, batches, missing)
        # No rank writes before every rank knows what is missing. Without file locks, another command may be writing.
        if len(set(processes.gather(missing))) > 1:
            raise UserError(f"{self.folder}: another command is filling it; wait for it or stop it, and run this again")
        batches.take_share(processes)
        return batches

    def _open(self, identity: Mapping[str, str]) -> None:
        """Create the folder if there is none, and check the vocabulary over which probabilities are kept."""
        model, head = self.teacher.model, None
        assert model is not None
        if self.section.form == "hidden":
            head = whole_head(model.head)
            vocabulary = len(head["weight"])
        else:
            # The distribution is over the tokens that the student shares, or over the teacher's own.
            _ = self.run.uncached.grouped
            assert model.head.vocabulary is not None
            vocabulary = model.head.vocabulary
            check_top_k(self.section, vocabulary)
        if self.processes.first and not (self.folder / ABOUT).exists():
            fields = cached_fields(head, self.section.likeliest or 0, vocabulary)
            counts = {source.name: len(source) for source in self.run.sources}
            about = {
                "identity": dict(identity),
                "teacher": describe_teacher(self.teacher, vocabulary),
                **TokenCache.describe(counts, self.config.data.max_length, fields),
            }
            make_folder(self.folder, WHAT, about, lambda made: save_head(made, model, head))
        self.processes.barrier()
        stored = read_about(self.folder)["teacher"]["vocabulary"]
        if stored != vocabulary:
            raise UserError(
                f"{self.folder}: holds probabilities over {stored:,} tokens, but this student is compared on "
                f"{vocabulary:,}; name another folder"
            )

    def _missing(self, sources: Sequence[Source | TextSource]) -> list[list[SampleId]]:
        """Return the missing samples in micro-batches, sorted by length within windows of the data's own order.

        Samples that could not be used are tried again: an image may have been repaired.
        """
        missing = [self.cache.sample_id(number) for number in self.cache.missing(left_out=True)]
        size = self.micro_batch_size
        batches: list[list[SampleId]] = []
        for start in range(0, len(missing), _WINDOW * size):
            window = missing[start : start + _WINDOW * size]
            window.sort(key=lambda sample_id: -sources[sample_id[0]].size(sample_id[1]))
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        return batches

    def write(self, item: Step) -> None:
        self.problems += item.problems
        (found,) = item.batches
        batch = found.batch.to(self.processes.device)
        batch = replace(batch, teacher=batch.student)  # the teacher was encoded in the student's place
        targets = self.teacher.outputs(batch).targets
        assert isinstance(targets, HiddenTargets)
        with torch.no_grad():
            stored = cached_values(targets, batch.targets, self.cache.fields)
        values = {name: value.cpu() for name, value in stored.items()}

        # Collect each sample's parts: a micro-batch may hold several pieces or answers of one, in any order.
        parts: dict[SampleId, list[tuple[int, dict[str, Tensor]]]] = {}
        start = 0
        for origin in batch.origins:
            part = {name: value[start : start + origin.tokens] for name, value in values.items()}
            parts.setdefault(origin.sample_id, []).append((origin.start, part))
            start += origin.tokens

        for sample in found.samples:
            if sample.bad is not None:
                self.writer.leave_out(sample.sample_id, sample.digest, sample.bad)
                continue
            assert sample.encoded is not None
            pieces = [part for _, part in sorted(parts[sample.sample_id], key=lambda piece: piece[0])]
            whole = {}
            for name in self.cache.fields:
                whole[name] = torch.cat([piece[name] for piece in pieces])
            self.writer.write(sample.sample_id, sample.digest, sample.encoded, whole)

    def close(self) -> None:
        self.writer.close()

    def report(self) -> None:
        problems = self.processes.gather(self.problems)
        if not self.processes.first:
            return
        cache, log = TokenCache(self.folder), ProblemLog()
        for part in problems:
            log.add(part)
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        say(f"{self.folder}: {cache.tokens:,} tokens in {in_words(size)}; {log.summary()}")
        missing = len(cache.missing())
        if missing:
            raise UserError(f"{self.folder}: {missing:,} samples are still missing; run vlm-distill cache again")


def _estimate(cache: TokenCache, batches: _TeacherSteps, count: int) -> None:
    """Estimate the cache's size from some samples and show it. Raise ``UserError`` if the disk is too small."""
    sample_ids = [sample_id for batch in batches.sample_ids for sample_id in batch]
    chosen = np.unique(np.linspace(0, len(sample_ids) - 1, min(_MEASURED, len(sample_ids)), dtype=np.int64))
    measured: list[tuple[int, int]] = []
    for i in chosen:
        sample = _Sample(sample_ids[i])
        try:
            batches.read(sample)
        except BadSample:
            continue
        assert sample.encoded is not None
        encoded = sample.encoded
        spans = 12 if encoded.spans is not None else 0
        tokens = int(encoded.supervised.sum())
        measured.append((tokens, tokens * (bytes_a_token(cache.fields) + spans) + 5 * len(encoded.input_ids) + 40))
    if not measured:
        return
    total_tokens, total_bytes = (count * sum(column) / len(measured) for column in zip(*measured, strict=True))
    stored, all_stored = bytes_a_token(cache.fields), total_bytes / total_tokens
    say(
        f"{cache.folder}: {stored:,} bytes a token, {all_stored:,.0f} with ids and spans; "
        f"{count:,} samples of about {total_tokens / count:.0f} tokens: {in_words(total_bytes)}"
    )
    check_room(cache.folder, WHAT, total_bytes, "choose form topk, or form token for alm")
