"""The loop that fills a cache: all ranks run what is missing through a model, each writing its share of the records."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from torch.utils.data import Dataset

from data.batch import SampleId
from data.workers import make_loader
from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.launch import cores
from vlm_distill.runtime.processes import Processes

T = TypeVar("T")

# Seconds between two lines of progress, and micro-batches after which the ranks wait for each other.
_SHOWN_EVERY, _TOGETHER = 10.0, 64


class SampleBatches(Dataset[T]):
    """Micro-batches of samples, by number. A subclass reads a micro-batch in ``__getitem__``.

    Attributes:
        sample_ids: the samples of each micro-batch.
    """

    def __init__(self, sample_ids: Sequence[Sequence[SampleId]]) -> None:
        self.sample_ids = sample_ids

    def __len__(self) -> int:
        return len(self.sample_ids)

    def take_share(self, processes: Processes) -> None:
        """Keep this rank's share: the same number of micro-batches on every rank, padded with empty ones."""
        padding: list[Sequence[SampleId]] = [()] * (-len(self) % processes.world)
        self.sample_ids = [*self.sample_ids, *padding][processes.rank :: processes.world]


class Filling(ABC, Generic[T]):
    """How one kind of record is filled.

    On every rank, :func:`fill_records` calls ``prepare``, ``begin``, ``write`` for each micro-batch, ``close`` and
    ``report``, in this order. All but ``close`` may be collective.

    Args:
        config: the run that will read the cache.
        processes: the ranks.
    """

    #: The configuration key of the cache.
    key: ClassVar[str]
    folder: Path

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes

    @property
    def micro_batch_size(self) -> int:
        training = self.config.training
        return training.micro_batch_size or max(1, training.batch_size // self.processes.world)

    @abstractmethod
    def prepare(self) -> SampleBatches[T] | None:
        """Load the model and create the folder. Return this rank's share of the missing samples; ``None`` for none."""

    def begin(self) -> None:
        """Write what all samples share."""

    @abstractmethod
    def write(self, item: T) -> None:
        """Run one micro-batch through the model and write its records."""

    @abstractmethod
    def close(self) -> None:
        """Flush the remaining records to disk."""

    @abstractmethod
    def report(self) -> None:
        """Show what the cache holds now."""


def fill_records(filling: Filling[T]) -> None:
    """Fill a cache. Collective."""
    batches = filling.prepare()
    if batches is None:
        return
    data, count = filling.config.data, len(batches)
    progress = Progress(filling.processes, count)
    items = make_loader(batches, 0, count, workers=min(data.workers, cores()), prefetch=data.prefetch)
    try:
        filling.begin()
        for done, item in enumerate(items, 1):
            filling.write(item)
            progress.update(done)
    finally:
        filling.close()
    filling.report()


@dataclass
class Progress:
    """Shows how far the ranks are, and keeps their watchdogs informed."""

    processes: Processes
    total: int
    began: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)

    def update(self, done: int) -> None:
        """Note that ``done`` micro-batches are written. Every rank calls it after each micro-batch."""
        phase = f"writing micro-batch {done} of {self.total} into the cache"
        self.processes.watch.phase(phase, limited=done < self.total)
        # Otherwise ranks could drift hours apart, and the first would wait for the last beyond the watchdog's limit.
        if done % _TOGETHER == 0:
            self.processes.barrier()
        now = time.monotonic()
        if self.processes.first and now - self.shown > _SHOWN_EVERY:
            self.shown = now
            left = (now - self.began) / done * (self.total - done)
            say(f"{done / self.total:.0%}, about {left / 60:.1f} minutes left")


def say(text: str) -> None:
    plain_console(stderr=True).print(text, soft_wrap=True)
