"""Load whole optimizer steps for one rank, by their number, and log the samples that are left out."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from PIL import Image
from torch.utils.data import Dataset

from .attempts import attempt, with_good
from .batch import Problem, SampleId, Step
from .collate import Collator, LoadedSample
from .conversation import ImageSource
from .encoding import Pair
from .errors import BadSample, UserError
from .images import load_image
from .mixture import Mixture
from .plain_text import TextSource
from .sample_images import load_images
from .saved_json import read_lines
from .sources import Source

T = TypeVar("T")

MANY_SAMPLES = 16
#: Decoded pixels of the samples that are encoded together. Beyond them the time goes into the pixels themselves, and
#: decoded photographs of a whole micro-batch would take much memory.
_PIXELS_TOGETHER = 2**20


@dataclass(frozen=True)
class StepSplit:
    """How an optimizer step's samples are split over ranks and micro-batches.

    Micro-batch ``a`` of rank ``r`` is number ``g = a · world + r`` of the step. It holds samples
    ``g · micro_batch_size`` to ``(g + 1) · micro_batch_size - 1``, so 1 rank × 4 micro-batches and 2 × 2 are the same.

    Attributes:
        micro_batch_size: samples of a micro-batch.
        accumulation: micro-batches of each rank in a step.
        rank: this process, from 0.
        world: number of processes.
    """

    micro_batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    def check(self, batch_size: int) -> None:
        """Raise ``UserError`` unless micro-batches of all ranks make up the batch exactly."""
        product = self.micro_batch_size * self.accumulation * self.world
        if batch_size != product:
            raise UserError(
                f"batch size {batch_size} is not {self.micro_batch_size} (micro-batch) x {self.accumulation} "
                f"(accumulation) x {self.world} (ranks) = {product}; change one of them"
            )

    def micro_batch(self, samples: Sequence[T], number: int) -> Sequence[T]:
        """Return this rank's micro-batch ``number`` of a step's samples."""
        start = (number * self.world + self.rank) * self.micro_batch_size
        return samples[start : start + self.micro_batch_size]

    def micro_batches(self, samples: Sequence[T]) -> list[Sequence[T]]:
        """Return this rank's micro-batches of a step's samples."""
        return [self.micro_batch(samples, number) for number in range(self.accumulation)]


class StepDataset(Dataset[Step]):
    """One rank's share of each optimizer step, by the step's number.

    Args:
        mixture: the order of samples.
        collator: encodes samples and makes micro-batches of them. Conversations that are too long are bad samples,
            never truncated; documents are cut into pieces and packed.
        split: this rank's share of a step.
        load: decodes an image.
        on_bad: what a bad sample does: ``skip`` makes its micro-batch smaller, ``fail`` ends the training.
        keep_conversations: put conversations and decoded images into the steps.

    Raises:
        UserError: the split does not fit the mixture's batch size; on access, with ``fail``, a bad sample.
    """

    def __init__(
        self,
        mixture: Mixture[Source | TextSource],
        collator: Collator,
        split: StepSplit,
        *,
        load: Callable[[ImageSource], Image.Image] = load_image,
        on_bad: Literal["skip", "fail"] = "skip",
        keep_conversations: bool = False,
    ) -> None:
        split.check(mixture.batch_size)
        self.mixture = mixture
        self.collator = collator
        self.split = split
        self.load = load
        self.on_bad = on_bad
        self.keep_conversations = keep_conversations

    def locate_samples(self, index: int, number: int) -> str:
        """Say where to find the samples of this rank's micro-batch ``number`` of a step."""
        return describe_samples(self.mixture.sources, self.split.micro_batch(self.mixture.samples_of(index), number))

    def __getitem__(self, index: int) -> Step:
        step = Step(index, [])
        for sample_ids in self.split.micro_batches(self.mixture.samples_of(index)):
            step.consumed += len(sample_ids)
            pairs: list[Pair] = []
            samples, parts = [], []
            for (source, number), result in zip(sample_ids, self._encoded(sample_ids), strict=True):
                if isinstance(result, BadSample):
                    step.problems.append(problem_of(self.mixture.sources[source], number, result, self.on_bad))
                    continue
                (sample, images, _), found = result
                pairs += found
                if self.keep_conversations:
                    samples.append((sample, images))
                    parts += self.collator.parts(sample, images)
                step.tokens += sum(len(pair.student.input_ids) for pair in found)
            batch = self.collator.batch(pairs)
            if self.keep_conversations:
                step.conversations.append(samples)
                batch.conversations = parts
            step.batches.append(batch)
        return step

    def _encoded(self, sample_ids: Sequence[SampleId]) -> Iterator[tuple[LoadedSample, list[Pair]] | BadSample]:
        """Yield each sample and its pairs, or why it is bad. Small samples are encoded together."""
        waiting: list[LoadedSample | BadSample] = []
        pixels = 0
        for sample_id in sample_ids:
            loaded = attempt(self._load, sample_id)
            waiting.append(loaded)
            if not isinstance(loaded, BadSample):
                pixels += sum(image.width * image.height for image in loaded.images)
            if pixels > _PIXELS_TOGETHER:
                yield from with_good(self._encode, waiting)
                waiting, pixels = [], 0
        yield from with_good(self._encode, waiting)

    def _encode(self, samples: Sequence[LoadedSample]) -> list[tuple[LoadedSample, list[Pair]] | BadSample]:
        results = zip(samples, self.collator.encode_all(samples), strict=True)
        return [pairs if isinstance(pairs, BadSample) else (sample, pairs) for sample, pairs in results]

    def try_sample(self, sample_id: SampleId) -> tuple[int, int]:
        """Encode a sample for both models, as training does.

        Returns:
            Its number of images, and the number of its answers' tokens that are not compared with the teacher's,
            because the two chat templates cut the answer's edge differently.

        Raises:
            BadSample: training would leave the sample out.
        """
        loaded = self._load(sample_id)
        apart = 0
        for pair in self.collator.encode(*loaded):
            if pair.groups is None:
                apart += int((~pair.distilled & ~pair.student.ends[pair.student_tokens]).sum())
        return len(loaded.images), apart

    def _load(self, sample_id: SampleId) -> LoadedSample:
        source, number = sample_id
        sample = self.mixture.sources[source][number]
        return LoadedSample(*load_images(sample, self.load), sample_id)


def problem_of(source: Located, index: int, bad: BadSample, on_bad: Literal["skip", "fail"]) -> Problem:
    """Return a bad sample as a problem to count, or with ``fail`` raise it as a ``UserError``."""
    line = source.line(index)
    if on_bad == "fail":
        raise UserError(
            f"{source.name}, line {line}: {' '.join(str(bad).split())}; fix it, or set data.bad_samples to skip"
        )
    return Problem(source.name, line, bad.reason, bad.detail)


def describe_samples(sources: Sequence[Located], sample_ids: Sequence[SampleId]) -> str:
    """Return the samples' names and lines: ``chat, lines 3, 17``."""
    lines: dict[str, list[int]] = {}
    for source, index in sample_ids[:MANY_SAMPLES]:
        lines.setdefault(sources[source].name, []).append(sources[source].line(index))
    parts = []
    for name, numbers in lines.items():
        word = "line" if len(numbers) == 1 else "lines"
        parts.append(f"{name}, {word} {', '.join(map(str, numbers))}")
    more = len(sample_ids) - MANY_SAMPLES
    return "; ".join(parts) + (f" and {more} more" if more > 0 else "")


class Located(Protocol):
    """What locating a sample needs of its source."""

    @property
    def name(self) -> str: ...
    def line(self, index: int, /) -> int: ...


class ProblemLog:
    """Counts the samples that were left out and logs each of them once, however many epochs there are.

    An existing file is read and continued, as a resumed training needs it.

    Args:
        path: a JSONL file with ``source``, ``line``, ``reason`` and ``detail``; ``None`` only counts.

    Attributes:
        counts: number of different samples by (source, reason).
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.counts: Counter[tuple[str, str]] = Counter()
        self._seen: set[tuple[str, int]] = set()
        if path is not None and path.exists():
            self._resume(path)

    def _resume(self, path: Path) -> None:
        complete, newline, _ = path.read_bytes().rpartition(b"\n")
        # A killed process may have left half a line. Truncate: rewriting the file could be interrupted in turn.
        os.truncate(path, len(complete + newline))
        for number, entry in enumerate(read_lines(path), start=1):
            try:
                self._note(Problem(**entry))
            except TypeError:
                raise UserError(f"{path}, line {number}: not about a sample; remove that line, or the file") from None

    def add(self, problems: Iterable[Problem]) -> None:
        """Add the problems of a step, of one rank or of all."""
        new = [problem for problem in problems if self._note(problem)]
        if new and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(problem)) + "\n" for problem in new)

    def _note(self, problem: Problem) -> bool:
        """Count a problem. Return false if its sample is known."""
        key = (problem.source, problem.line)
        if key in self._seen:
            return False
        self._seen.add(key)
        self.counts[problem.source, problem.reason] += 1
        return True

    def summary(self) -> str:
        """Return one line, commonest first: ``3 samples left out: chat: too long (2), chat: image not found (1)``."""
        if not self.counts:
            return "no samples left out"
        total = self.counts.total()
        parts = (f"{source}: {reason} ({number})" for (source, reason), number in self.counts.most_common())
        return f"{total} sample{'' if total == 1 else 's'} left out: {', '.join(parts)}"
