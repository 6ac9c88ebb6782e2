"""Whole optimizer steps for one rank, by their numbers, and the record of the samples left out."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from PIL import Image
from torch.utils.data import Dataset

from .batch import Problem, Processor, Step
from .collate import EVERY_ANSWER, Collator, Pair, Turns
from .conversation import Conversation, Document
from .errors import BadSample, UserError
from .images import MAX_PIXELS, load_image
from .json_files import read_lines
from .mixture import Mixture
from .sources import Source, TextSource

T = TypeVar("T")

MANY_PLACES = 16


class StepDataset(Dataset[Step]):
    """One rank's share of each optimizer step, by the step's number.

    The rows of a step are dealt in micro-batches: the ``a``-th of rank ``r`` is number ``g = a · world + r`` of the
    step and holds rows ``g · micro_batch_size`` and following. So 1 rank × 4 micro-batches and 2 × 2 are the same ones.

    Args:
        mixture: the order of rows.
        student: the student's processor.
        teacher: the teacher's processor, or ``None`` to train without one.
        max_length: the most tokens in a row of either model; longer conversations are bad samples, never cut. Longer
            documents are cut into pieces. Those of a micro-batch are packed.
        packed: whether conversations are packed too, the student's and the teacher's.
        rank: this process, from 0.
        world: number of processes.
        micro_batch_size: rows in a micro-batch.
        accumulation: micro-batches of each rank in a step.
        roots: when given, folders outside of which no image is read.
        max_pixels: the largest image.
        on_bad: what a bad sample does: ``skip`` leaves its micro-batch smaller, ``fail`` ends the training.
        keep_samples: put conversations and decoded images into the steps, to look at them.
        grouped: whether student and teacher have different tokenizers, so that groups of tokens are compared.
        turns: what of conversations is learnt.

    Raises:
        UserError: the mixture's batch size is not ``micro_batch_size × accumulation × world``; on access, with
            ``fail``, a bad sample.
    """

    def __init__(
        self,
        mixture: Mixture[Source | TextSource],
        student: Processor,
        teacher: Processor | None,
        *,
        max_length: int,
        rank: int = 0,
        world: int = 1,
        micro_batch_size: int,
        accumulation: int = 1,
        roots: Sequence[Path] = (),
        max_pixels: int = MAX_PIXELS,
        on_bad: Literal["skip", "fail"] = "skip",
        keep_samples: bool = False,
        grouped: bool = False,
        turns: Turns = EVERY_ANSWER,
        packed: tuple[bool, bool] = (False, False),
    ) -> None:
        check_split(mixture.batch_size, micro_batch_size, accumulation, world)
        self.mixture = mixture
        self.collator = Collator(student, teacher, max_length, turns, grouped, packed)
        self.rank = rank
        self.world = world
        self.micro_batch_size = micro_batch_size
        self.accumulation = accumulation
        self.roots = tuple(roots)
        self.max_pixels = max_pixels
        self.on_bad = on_bad
        self.keep_samples = keep_samples

    def locate_samples(self, index: int, number: int) -> str:
        """Where the samples of this rank's micro-batch ``number`` of a step stand."""
        start = (number * self.world + self.rank) * self.micro_batch_size
        return places_in_words(
            self.mixture.sources, self.mixture.samples_of(index)[start : start + self.micro_batch_size]
        )

    def __getitem__(self, index: int) -> Step:
        step = Step(index, [])
        for rows in self.deal(self.mixture.samples_of(index)):
            step.rows += len(rows)
            pairs: list[Pair] = []
            samples, parts = [], []
            for source, row in rows:
                try:
                    sample, images, found = self._read(source, row)
                except BadSample as bad:
                    step.problems.append(problem_of(self.mixture.sources[source], row, bad, self.on_bad))
                    continue
                pairs += found
                samples.append((sample, images))
                parts += self.collator.parts(sample, images)
                step.tokens += sum(len(pair.student.input_ids) for pair in found)
            batch = self.collator.batch(pairs)
            if self.keep_samples:
                step.samples.append(samples)
                batch.conversations = parts
            step.batches.append(batch)
        return step

    def deal(self, rows: Sequence[T]) -> list[Sequence[T]]:
        """This rank's micro-batches of what a step has in order."""
        starts = [(a * self.world + self.rank) * self.micro_batch_size for a in range(self.accumulation)]
        return [rows[start : start + self.micro_batch_size] for start in starts]

    def try_row(self, source: int, row: int) -> tuple[int, int]:
        """Encode a row for both models, as training does.

        Returns:
            Its number of images, and how many of its answers' tokens are not compared with the teacher's, because the
            two chat templates cut the answer's edge in different places.

        Raises:
            BadSample: training would leave the row out.
        """
        _, images, pairs = self._read(source, row)
        apart = 0
        for pair in pairs:
            if pair.groups is None:
                apart += int((~pair.distilled & ~pair.student.ends[pair.student_tokens]).sum())
        return len(images), apart

    def _read(self, source: int, row: int) -> tuple[Conversation | Document, list[Image.Image], list[Pair]]:
        sample = self.mixture.sources[source][row]
        wanted = () if isinstance(sample, Document) else sample.images
        images = [load_image(i, roots=self.roots, max_pixels=self.max_pixels) for i in wanted]
        return sample, images, self.collator.encode(sample, images, (source, row))


def check_split(batch_size: int, micro_batch_size: int, accumulation: int, world: int) -> None:
    """Raises ``UserError`` where a batch is not cut into micro-batches of all ranks without a rest."""
    if batch_size != micro_batch_size * accumulation * world:
        raise UserError(
            f"batch size {batch_size} is not {micro_batch_size} (micro-batch) x {accumulation} "
            f"(accumulation) x {world} (ranks) = {micro_batch_size * accumulation * world}; change one of them"
        )


def problem_of(origin: Located, row: int, bad: BadSample, on_bad: Literal["skip", "fail"]) -> Problem:
    """A bad sample with its place, to be counted; with ``fail`` a ``UserError``."""
    line = origin.line(row)
    if on_bad == "fail":
        raise UserError(
            f"{origin.name}, line {line}: {' '.join(str(bad).split())}; mend it, or set data.bad_samples to skip"
        )
    return Problem(origin.name, line, bad.reason, bad.detail)


def places_in_words(sources: Sequence[Located], rows: Sequence[tuple[int, int]]) -> str:
    """(source, row) pairs as a person finds them: ``chat, lines 3, 17``."""
    lines: dict[str, list[int]] = {}
    for source, row in rows[:MANY_PLACES]:
        lines.setdefault(sources[source].name, []).append(sources[source].line(row))
    said = [f"{name}, line{'s'[: len(of) > 1]} {', '.join(map(str, of))}" for name, of in lines.items()]
    more = len(rows) - MANY_PLACES
    return "; ".join(said) + (f" and {more} more" if more > 0 else "")


class Located(Protocol):
    """What a problem's place is found with: any source of samples."""

    @property
    def name(self) -> str: ...
    def line(self, index: int, /) -> int: ...


class ProblemLog:
    """Counts the samples that were left out and writes each of them once, whatever the number of epochs.

    A file that is there already is read first and continued, for a training that is resumed.

    Args:
        path: a JSONL file with ``source``, ``line``, ``reason`` and ``detail``; ``None`` only counts.

    Attributes:
        counts: distinct samples by (source, reason).
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.counts: Counter[tuple[str, str]] = Counter()
        self._seen: set[tuple[str, int]] = set()
        if path is not None and path.exists():
            whole, newline, _ = path.read_bytes().rpartition(b"\n")
            # What a killed process left of its last line goes. Cut, not written anew, which might be broken off.
            os.truncate(path, len(whole + newline))
            for number, entry in enumerate(read_lines(path), start=1):
                try:
                    self._note(Problem(**entry))
                except TypeError:
                    raise UserError(
                        f"{path}, line {number}: not about a sample; remove that line, or the file"
                    ) from None

    def add(self, problems: Iterable[Problem]) -> None:
        """Notes the problems of a step, of one rank or of all."""
        new = [problem for problem in problems if self._note(problem)]
        if new and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(problem)) + "\n" for problem in new)

    def _note(self, problem: Problem) -> bool:
        place = (problem.source, problem.line)
        if place in self._seen:
            return False
        self._seen.add(place)
        self.counts[problem.source, problem.reason] += 1
        return True

    def summary(self) -> str:
        """One line, commonest first: ``3 samples left out: chat: too long (2), chat: image not found (1)``."""
        if not self.counts:
            return "no samples left out"
        total = self.counts.total()
        parts = (f"{source}: {reason} ({number})" for (source, reason), number in self.counts.most_common())
        return f"{total} sample{'' if total == 1 else 's'} left out: {', '.join(parts)}"
