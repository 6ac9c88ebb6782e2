"""What a dataset holds, read in order and ahead by worker processes; how they start, and what is said when one dies."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .errors import UserError

T = TypeVar("T")

MANY_FILES = 65_536


def make_loader(dataset: Dataset[T], start: int, stop: int, workers: int = 0, prefetch: int = 2) -> Iterator[T]:
    """Items ``start`` to ``stop - 1`` of a dataset in order, the same for any number of workers.

    Args:
        dataset: gives an item by its number.
        start: the first item.
        stop: the item after the last; of a training through all epochs, so that workers start once.
        workers: processes that make items ahead; with 0 they are made here, when asked for.
        prefetch: items each worker makes ahead.

    Yields:
        The items, in pinned memory where there is a CUDA device and they have ``pin_memory``.

    Raises:
        UserError: as the dataset raises it, when its item's turn comes; a worker was killed or has crashed.
    """
    if workers:
        _allow_many_open_files()
    loader: DataLoader[_Delivery[T]] = DataLoader(
        _Deliveries(dataset),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        multiprocessing_context=_context() if workers else None,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        # A loader draws a seed when it starts; the training's random numbers are not its to take.
        generator=torch.Generator(),
    )
    others, before = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    deliveries = iter(loader)
    if threading.current_thread() is threading.main_thread():
        _end_calmly(before)
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
        if delivery.mistake is not None:
            raise UserError(delivery.mistake)
        yield delivery.content


class _Flag:
    """An event between processes that takes no lock: one killed as it looks at an event leaves the others waiting."""

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


def _context() -> BaseContext:
    context = copy(multiprocessing.get_context())
    context.Event = _Flag  # type: ignore[method-assign,assignment]
    return context


def _end_calmly(before: Any) -> None:
    """Takes back DataLoader's handler of the end of a process, for the one of before.

    It would raise wherever this process is when a worker dies: inside a destructor that aborts it, or while this file
    asks what happened. DataLoader sets it once, so that one that somebody else has used before has left it here.
    """
    theirs = getattr(before, "__module__", None) == "torch.utils.data._utils.signal_handling"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if theirs or before is None else before)


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
class _Delivery(Generic[T]):
    """An item, or the mistake in its way, in words: an exception would arrive wrapped in a traceback."""

    content: T
    mistake: str | None = None

    def pin_memory(self) -> _Delivery[T]:
        """What DataLoader calls, in this process, on what its workers send."""
        pin = getattr(self.content, "pin_memory", None)
        return self if pin is None else _Delivery(pin())


class _Deliveries(Dataset[_Delivery[Any]]):
    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> _Delivery[Any]:
        try:
            return _Delivery(self.items[index])
        except UserError as error:
            return _Delivery(None, str(error))
        except OSError as error:
            # Images that cannot be read are bad samples: this is the file of the samples themselves.
            what = f"{error.filename or 'a data file'} cannot be read any more: {error.strerror or error}"
            return _Delivery(None, f"{what}; put it back, and start the run again to resume")


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
