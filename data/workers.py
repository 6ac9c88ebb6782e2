"""What a dataset holds, read in order and ahead by worker processes; how they start, and what is said when one dies."""

from __future__ import annotations

import gc
import io
import math
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import UserError

T = TypeVar("T")

_ALIGNED = 64  # bytes, which every dtype divides


def make_loader(dataset: Dataset[T], start: int, stop: int, workers: int = 0, prefetch: int = 2) -> Iterator[T]:
    """Items ``start`` to ``stop - 1`` of a dataset in order, the same for any number of workers.

    Args:
        dataset: gives an item by its number.
        start: the first item.
        stop: the item after the last; of a training through all epochs, so that workers start once.
        workers: processes that make items ahead; with 0 they are made here, when asked for.
        prefetch: items each worker makes ahead.

    Yields:
        The items, in pinned memory where there is a CUDA device. All tensors of one lie in one piece of memory.

    Raises:
        UserError: as the dataset raises it, when its item's turn comes; a worker was killed or has crashed.
    """
    loader: DataLoader[_Delivery] = DataLoader(
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
        item = delivery.unpack()
        if isinstance(item, _Mistake):
            raise UserError(item.text)
        yield item


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
    # What one sends can be cut off a moment before it has ended, and its files are closed before that.
    ended = wait([worker.sentinel for worker in workers], 1.0)
    for process in workers:
        process.join(1.0 if process.sentinel in ended else 0.0)
    worker = next((process for process in workers if process.exitcode), None)
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
class _Mistake:
    """What is in an item's way, in words: an exception would arrive wrapped in a traceback."""

    text: str


@dataclass
class _Delivery:
    """An item in one tensor: the bytes of its own tensors, and last its pickle without these.

    Of each tensor that a worker sends, this process opens a file and asks the worker for it, which takes longer than
    copying most of them. Above all a message is so short that it is written at once: of one that is cut off, as its
    worker is killed, this process would wait for the rest for ever.

    Attributes:
        content: uint8 ``[bytes]``.
        pickled: the number of bytes of the pickle.
    """

    content: Tensor
    pickled: int

    @staticmethod
    def pack(item: Any) -> _Delivery:
        file = io.BytesIO()
        packer = _Packer(file)
        packer.dump(item)
        pickled = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        content = torch.empty(packer.size + len(pickled), dtype=torch.uint8)
        for tensor, place in packer.found.values():
            place.of(content).copy_(tensor)
        content[packer.size :] = pickled
        return _Delivery(content, len(pickled))

    def unpack(self) -> Any:
        return _Unpacker(self.content, self.pickled).load()

    def pin_memory(self) -> _Delivery:
        """What DataLoader calls, in this process, on what its workers send."""
        return _Delivery(self.content.pin_memory(), self.pickled)


class _Place(NamedTuple):
    """Where a tensor's bytes begin in the content, and what they are."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, content: Tensor) -> Tensor:
        stop = self.start + math.prod(self.shape) * self.dtype.itemsize
        return content[self.start : stop].view(self.dtype).as_strided(self.shape, self.stride)


class _Packer(pickle.Pickler):
    """Leaves tensors out and gives each a place; one that is there twice stays one."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.found: dict[int, tuple[Tensor, _Place]] = {}
        self.size = 0

    def persistent_id(self, obj: Any) -> _Place | None:
        if type(obj) is not Tensor:
            return None
        if id(obj) not in self.found:
            # Without gaps, in the memory format that it has.
            stride = torch.empty_like(obj, device="meta").stride()
            self.found[id(obj)] = obj, _Place(self.size, obj.dtype, tuple(obj.shape), stride)
            self.size += -(-obj.nbytes // _ALIGNED) * _ALIGNED
        return self.found[id(obj)][1]


class _Unpacker(pickle.Unpickler):
    """Puts the tensors back, as views of the content."""

    def __init__(self, content: Tensor, pickled: int) -> None:
        super().__init__(io.BytesIO(content[len(content) - pickled :].numpy().tobytes()))
        self.content = content
        self.found: dict[_Place, Tensor] = {}

    def persistent_load(self, place: _Place) -> Tensor:
        if place not in self.found:
            self.found[place] = place.of(self.content)
        return self.found[place]


class _Deliveries(Dataset[_Delivery]):
    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> _Delivery:
        return _Delivery.pack(self._item(index))

    def _item(self, index: int) -> Any:
        try:
            return self.items[index]
        except UserError as error:
            return _Mistake(str(error))
        except OSError as error:
            # Images that cannot be read are bad samples: this is the file of the samples themselves.
            what = f"{error.filename or 'a data file'} cannot be read any more: {error.strerror or error}"
            return _Mistake(f"{what}; put it back, and start again, which resumes a run")


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
