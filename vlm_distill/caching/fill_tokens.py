"""A teacher's cache: filled by ``vlm-distill cache``, compared with what a run is about to learn from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import DistillationBatch, Encoded, Problem, Step
from data.collate import Collator, Pair, Turns, encode_teacher
from data.conversation import Document
from data.errors import BadSample, UserError
from data.images import load_image
from data.loader import ProblemLog, problem_of
from data.sources import Source, TextSource
from data.workers import make_loader
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import HiddenTargets
from vlm_distill.models.cached_teacher import cached_fields, cached_values, describe_teacher, save_head, whole_head
from vlm_distill.models.processor import Processor
from vlm_distill.models.teacher import Teacher
from vlm_distill.run import Run
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.launch import cores
from vlm_distill.runtime.processes import Processes
from vlm_distill.training.compatibility import check_packing
from vlm_distill.training.open_data import turns

from .check_tokens import cache_sections, check_likeliest, compare_contents, identity
from .store import ABOUT, check_room, in_words, make_folder, read_about
from .token_records import TokenCache, TokenWriter, bytes_a_token, digest_of

WHAT = "the teacher's outputs"
# Samples of which the size of the whole is estimated, and micro-batches among which rows are sorted by length.
_MEASURED, _WINDOW = 32, 64
# Seconds between two lines about how far it is, and micro-batches after which ranks wait for each other.
_TOLD_EVERY, _TOGETHER = 10.0, 64


@dataclass
class _Sample:
    """A row on its way into the cache: what the teacher's row is, or why there is none."""

    source: int
    row: int
    digest: int = 0
    encoded: Encoded | None = None
    bad: BadSample | None = None


@dataclass
class _Batch:
    """A micro-batch for the teacher, and the samples it is of; those without an encoding are not in it."""

    batch: DistillationBatch
    samples: list[_Sample]


class _Rows(Dataset[Step]):
    """Micro-batches of rows by number, the same on every rank.

    Args:
        rows: micro-batches of (source, row).
    """

    def __init__(
        self,
        config: RunConfig,
        sources: Sequence[Source | TextSource],
        processor: Processor,
        rows: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        data = config.data
        self.sources, self.processor, self.rows = sources, processor, rows
        self.max_length, self.turns, self.on_bad = data.max_length, turns(data), data.bad_samples
        self.roots, self.max_pixels = [Path(root) for root in data.roots], data.max_pixels
        self.collator = Collator(processor, None, data.max_length, Turns())

    def __getitem__(self, index: int) -> Step:
        pairs: list[Pair] = []
        samples: list[_Sample] = []
        step = Step(index, [])
        for source, row in self.rows[index]:
            sample = _Sample(source, row)
            samples.append(sample)
            try:
                pairs += self.read(sample)
            except BadSample as bad:
                step.problems.append(problem_of(self.sources[source], row, bad, self.on_bad))
                sample.bad = bad
        step.batches.append(_Batch(self.collator.batch(pairs), samples))
        return step

    def read(self, sample: _Sample) -> list[Pair]:
        """The teacher's rows of a sample, which is told apart and encoded on the way."""
        content = self.sources[sample.source][sample.row]
        wanted = () if isinstance(content, Document) else content.images
        images = [load_image(image, roots=self.roots, max_pixels=self.max_pixels) for image in wanted]
        sample.digest = digest_of(content, images)
        pairs, encoded = encode_teacher(content, images, self.processor, self.max_length, self.turns)
        sample.encoded = encoded
        return self.collator.placed(pairs, sample.source, sample.row)


@dataclass
class Told:
    """How far the ranks are, which the first one says and each tells to the watch of the others.

    Every rank calls it after each of as many micro-batches.
    """

    processes: Processes
    total: int
    began: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    def __call__(self, done: int) -> None:
        said = f"writing micro-batch {done} of {self.total} into the cache"
        self.processes.watch.phase(said, limited=done < self.total)
        # Hours apart at its end, the first rank would wait for the last one longer than any is waited for.
        if done % _TOGETHER == 0:
            self.processes.barrier()
        now = time.monotonic()
        if self.processes.first and now - self.last > _TOLD_EVERY:
            self.last = now
            left = (now - self.began) / done * (self.total - done)
            say(f"{done / self.total:.0%}, about {left / 60:.1f} minutes left")


def say(text: str) -> None:
    plain_console(stderr=True).print(text, soft_wrap=True)


def fill(config: RunConfig, processes: Processes) -> None:
    """Runs the teacher over all rows of all sources that are not in its cache yet, and keeps its outputs there.

    Args:
        config: the run that will learn from it.
        processes: the ranks; every rank calls this.

    Raises:
        UserError: the cache is of something else, or has no room, or a row is a bad sample that must not be.
    """
    _, section = cache_sections(config)
    run = Run(config, processes)
    _ = run.terms
    folder, sources = Path(section.folder), run.sources
    wanted = identity(config, sources)
    if (folder / ABOUT).exists():
        compare_contents(folder, wanted)
        if not TokenCache(folder).missing():
            if processes.first:
                say(f"{folder} is whole: {TokenCache(folder).tokens:,} tokens")
            return
    teacher = run.uncached.teacher
    assert teacher is not None
    assert teacher.model is not None
    check_packing(config.data.train, None, teacher.model, False)
    _open(run, folder, wanted, teacher, processes)
    cache = TokenCache(folder)
    # Rows that could not be used are tried again: an image may have been mended.
    micro = config.training.micro_batch_size or max(1, config.training.batch_size // processes.world)
    rows = _micro_batches(cache, sources, micro)
    dataset = _Rows(config, sources, teacher.model.processor, rows)
    missing = sum(map(len, rows))
    if processes.first:
        _estimate(cache, dataset, missing)
    # Nobody writes before every rank knows what is missing. Where no file can be locked, another command may have.
    if len(set(processes.gather(missing))) > 1:
        raise UserError(f"{folder}: another command is filling it; wait for it or stop it, and run this again")

    turns_ = math.ceil(len(rows) / processes.world)
    own = [number * processes.world + processes.rank for number in range(turns_)]
    # A sharded teacher is run by all ranks together: one may get nothing at the end.
    dataset.rows = [rows[number] if number < len(rows) else () for number in own]
    writer, problems, told = TokenWriter(cache), list[Problem](), Told(processes, turns_)
    workers = min(config.data.workers, cores())
    try:
        for step in make_loader(dataset, 0, turns_, workers=workers, prefetch=config.data.prefetch):
            problems += step.problems
            _write(writer, teacher, step.batches[0], cache, processes)
            told(step.index + 1)
    finally:
        writer.close()
    _report(folder, processes.gather(problems), processes)


def _open(run: Run, folder: Path, wanted: Mapping[str, str], teacher: Teacher, processes: Processes) -> None:
    """Makes the folder if there is none, and agrees on the vocabulary that likeliest tokens are chosen from."""
    config = run.config
    _, section = cache_sections(config)
    model, kept = teacher.model, None
    assert model is not None
    if section.form == "topk":
        # The distribution is over the tokens that the student shares.
        vocabulary = teacher.align(run.uncached.student)
        check_likeliest(section, vocabulary)
    else:
        kept = whole_head(model.head)
        vocabulary = len(kept["weight"])
    if processes.first and not (folder / ABOUT).exists():
        fields = cached_fields(kept, section.k, vocabulary)
        about = {
            "identity": dict(wanted),
            "teacher": describe_teacher(teacher, vocabulary),
            **TokenCache.describe({source.name: len(source) for source in run.sources}, config.data.max_length, fields),
        }
        make_folder(folder, WHAT, about, lambda made: save_head(made, model, kept))
    processes.barrier()
    stored = read_about(folder)["teacher"]["vocabulary"]
    if stored != vocabulary:
        raise UserError(
            f"{folder}: holds the likeliest of {stored:,} tokens, and this student shares {vocabulary:,} with the "
            "teacher; name another folder"
        )


def _micro_batches(
    cache: TokenCache, sources: Sequence[Source | TextSource], micro: int
) -> list[list[tuple[int, int]]]:
    """Missing rows in micro-batches, sorted by length within windows of the data's own order."""
    missing = [cache.place(number) for number in cache.missing(left_out=True)]
    rows: list[list[tuple[int, int]]] = []
    for start in range(0, len(missing), _WINDOW * micro):
        window = sorted(missing[start : start + _WINDOW * micro], key=lambda place: -sources[place[0]].size(place[1]))
        rows += [window[i : i + micro] for i in range(0, len(window), micro)]
    return rows


def _estimate(cache: TokenCache, dataset: _Rows, count: int) -> None:
    """Says how large the cache will be, by some samples, before the teacher runs; raises ``UserError`` without room."""
    places = [place for rows in dataset.rows for place in rows]
    measured: list[tuple[int, int]] = []
    for i in np.unique(np.linspace(0, len(places) - 1, min(_MEASURED, len(places)), dtype=np.int64)):
        sample = _Sample(*places[i])
        try:
            dataset.read(sample)
        except BadSample:
            continue
        assert sample.encoded is not None
        row, placed = sample.encoded, sample.encoded.places is not None
        tokens = int(row.supervised.sum())
        measured.append((tokens, tokens * (bytes_a_token(cache.fields) + 12 * placed) + 5 * len(row.input_ids) + 40))
    if not measured:
        return
    tokens, size = (count * sum(column) / len(measured) for column in zip(*measured, strict=True))
    say(
        f"{cache.folder}: {bytes_a_token(cache.fields):,} bytes a token, {size / tokens:,.0f} with all that stands "
        f"beside them; {count:,} rows of about {tokens / count:.0f} tokens: {in_words(size)}"
    )
    check_room(cache.folder, WHAT, size, "choose form topk")


def _write(writer: TokenWriter, teacher: Teacher, found: _Batch, cache: TokenCache, processes: Processes) -> None:
    """One micro-batch through the teacher and into the cache."""
    batch = found.batch.to(processes.device)
    batch = replace(batch, teacher=batch.student)  # it is alone there
    targets = teacher.outputs(batch).targets
    assert isinstance(targets, HiddenTargets)
    with torch.no_grad():
        values = {name: value.cpu() for name, value in cached_values(targets, cache.fields).items()}
    parts: dict[tuple[int, int], list[tuple[int, dict[str, Tensor]]]] = {}
    start = 0
    for origin in batch.origins:
        part = {name: value[start : start + origin.tokens] for name, value in values.items()}
        parts.setdefault((origin.source, origin.row), []).append((origin.start, part))
        start += origin.tokens
    for sample in found.samples:
        if sample.bad is not None:
            writer.leave_out(sample.source, sample.row, sample.digest, sample.bad)
            continue
        assert sample.encoded is not None
        pieces = [part for _, part in sorted(parts[sample.source, sample.row], key=lambda piece: piece[0])]
        whole = {name: torch.cat([piece[name] for piece in pieces]) for name in cache.fields}
        writer.write(sample.source, sample.row, sample.digest, sample.encoded, whole)


def _report(folder: Path, problems: Sequence[Sequence[Problem]], processes: Processes) -> None:
    if not processes.first:
        return
    cache, log = TokenCache(folder), ProblemLog()
    log.add(problem for part in problems for problem in part)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    say(f"{folder}: {cache.tokens:,} tokens in {in_words(size)}; {log.summary()}")
    if cache.missing():
        raise UserError(f"{folder}: {len(cache.missing()):,} rows are still missing; run vlm-distill cache again")
