"""Whole optimizer steps for one rank, made ahead by worker processes, and the record of the samples left out."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .batch import Problem, Processor, Step
from .collate import EVERY_ANSWER, Collator, Pair, Turns
from .conversation import Conversation, Document
from .errors import BadSample, UserError
from .images import MAX_PIXELS, load_image
from .mixture import Mixture
from .sources import Source, TextSource

T = TypeVar("T")

MANY_FILES = 65_536
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

    def places(self, index: int, number: int) -> str:
        """Where the samples of this rank's micro-batch ``number`` of a step stand."""
        start = (number * self.world + self.rank) * self.micro_batch_size
        return places_in_words(self.mixture.sources, self.mixture.rows(index)[start : start + self.micro_batch_size])

    def __getitem__(self, index: int) -> Step:
        step = Step(index, [])
        for rows in self.deal(self.mixture.rows(index)):
            pairs: list[Pair] = []
            samples = []
            for source, row in rows:
                try:
                    sample, images, found = self._read(source, row)
                except BadSample as bad:
                    step.problems.append(problem_of(self.mixture.sources[source], row, bad, self.on_bad))
                    continue
                pairs += found
                samples.append((sample, images))
                step.tokens += sum(len(pair.student.input_ids) for pair in found)
            batch = self.collator.batch(pairs)
            if self.keep_samples:
                step.samples.append(samples)
                batch.conversations = samples
            step.batches.append(batch)
        return step

    def deal(self, rows: Sequence[T]) -> list[Sequence[T]]:
        """This rank's micro-batches of what a step has in order."""
        starts = [(a * self.world + self.rank) * self.micro_batch_size for a in range(self.accumulation)]
        return [rows[start : start + self.micro_batch_size] for start in starts]

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


def make_loader(dataset: Dataset[Step], start: int, stop: int, workers: int = 0, prefetch: int = 2) -> Iterator[Step]:
    """Steps ``start`` to ``stop - 1`` in order, the same for any number of workers.

    Args:
        dataset: gives a step by its number.
        start: the first step.
        stop: the step after the last; through all epochs, so that workers start once for a training.
        workers: processes that make steps ahead; with 0 they are made here, when asked for.
        prefetch: steps each worker makes ahead.

    Yields:
        The steps, in pinned memory where there is a CUDA device.

    Raises:
        UserError: as the dataset raises it, when its step's turn comes; a worker was killed or has crashed.
    """
    if workers:
        _allow_many_open_files()
    loader: DataLoader[_Delivery] = DataLoader(
        _Deliveries(dataset),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        # A loader draws a seed when it starts; the training's random numbers are not its to take.
        generator=torch.Generator(),
    )
    others, before = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    deliveries = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # DataLoader's would raise wherever this process is when a worker dies: inside a destructor that aborts it.
        signal.signal(signal.SIGCHLD, before)
    own = [process for process in multiprocessing.active_children() if process not in others]
    while True:
        try:
            delivery = next(deliveries)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            died = _death_of(own)
            if died is None:
                raise
            raise UserError(died) from error
        if isinstance(delivery.content, str):
            raise UserError(delivery.content)
        yield delivery.content


def _death_of(workers: Sequence[multiprocessing.process.BaseProcess]) -> str | None:
    """That one of these processes was killed or has crashed, in words; ``None`` where none was."""
    wait([worker.sentinel for worker in workers], 1.0)  # what one sends can be cut off a moment before it has ended
    worker = next((worker for worker in workers if worker.exitcode), None)
    if worker is None or worker.exitcode is None:
        return None
    if worker.exitcode == -signal.SIGBUS:
        cause = "a data file was cut short while it was read, or /dev/shm is full; mend that"
    else:
        cause = "this machine ran out of memory, or somebody stopped it; fewer data.workers and a smaller data.prefetch"
        cause += " need less"
    how = f" of {signal.Signals(-worker.exitcode).name}" if worker.exitcode < 0 else ""
    return f"a worker that reads the data (process {worker.pid}) died{how}: {cause}"


@dataclass
class _Delivery:
    """A step, or the message of the mistake in its way: an exception would arrive wrapped in a traceback."""

    content: Step | str

    def pin_memory(self) -> _Delivery:
        """What DataLoader calls, in this process, on what its workers send."""
        if isinstance(self.content, str):
            return self
        return _Delivery(replace(self.content, batches=[batch.pin_memory() for batch in self.content.batches]))


class _Deliveries(Dataset[_Delivery]):
    def __init__(self, steps: Dataset[Step]) -> None:
        self.steps = steps

    def __getitem__(self, index: int) -> _Delivery:
        try:
            return _Delivery(self.steps[index])
        except UserError as error:
            return _Delivery(str(error))
        except OSError as error:
            # Images that cannot be read are bad samples: this is the file of the samples themselves.
            what = f"{error.filename or 'a data file'} cannot be read any more: {error.strerror or error}"
            return _Delivery(f"{what}; put it back, and start the run again to resume")


def _unchanged(value: Any) -> Any:
    return value


def _start_worker(_: int) -> None:
    # The terminal and the launcher signal the whole process group. The training decides when to stop, and goes on
    # reading until it has written its checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    # What the training has left is not this process's to destroy: threads of its communication, which that would wait
    # for or join, are not here.
    gc.freeze()


def _allow_many_open_files() -> None:
    # Each tensor that a worker sends takes an open file here until it is freed; a thousand, the usual limit, is soon
    # reached with many micro-batches in a step.
    if sys.platform == "linux":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
            for line in whole.splitlines():
                self._note(Problem(**json.loads(line)))

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
