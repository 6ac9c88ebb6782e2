"""DataLoader wrapper: ordered prefetch, packed transfer, readable worker-death errors."""

from __future__ import annotations

import gc
import io
import math
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Generator, Sequence
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

_ALIGNED = 64  # bytes, a multiple of every dtype's size


def make_loader(dataset: Dataset[T], start: int, stop: int, workers: int = 0, prefetch: int = 2) -> Generator[T]:
    """Yield items ``start`` to ``stop - 1`` of a dataset in order, the same for any number of workers.

    Args:
        dataset: returns an item by its number.
        start: the first item.
        stop: the last item + 1. A training passes its last step, so that workers start only once.
        workers: processes that make items ahead; with 0, this process makes each item when it is needed.
        prefetch: items that each worker makes ahead.

    Yields:
        The items. With workers or a CUDA device, all tensors of an item share one block of memory, which is pinned if
        there is a CUDA device.

    Raises:
        UserError: the dataset raised it for the next item, or a worker was killed or crashed.
    """
    if not workers and not torch.cuda.is_available():
        # Nothing to send and nothing to pin: items need not be packed.
        items = _Deliveries(dataset)
        for index in range(start, stop):
            yield _unmistaken(items.item(index))
        return
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
        # A loader draws a seed when it starts, which must not come from the training's generator.
        generator=torch.Generator(),
    )
    others, before = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    deliveries = iter(loader)
    if threading.current_thread() is threading.main_thread():
        _restore_handler(before)
    own = [process for process in multiprocessing.active_children() if process not in others]
    try:
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
            yield _unmistaken(delivery.unpack())
    finally:
        del deliveries  # ends the workers, even if an error's traceback keeps this frame


def _unmistaken(item: Any) -> Any:
    """Return an item, or raise the error that its message describes."""
    if isinstance(item, _Mistake):
        raise UserError(item.text)
    return item


class _Flag:
    """An event between processes without a lock, which a process killed while holding it would never release."""

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


def _restore_handler(before: Any) -> None:
    """Replace DataLoader's SIGCHLD handler by the previous one.

    It would raise wherever this process is when a worker dies: inside a destructor, which aborts the process, or while
    :func:`_death_of` looks for the cause. DataLoader sets it once, so ``before`` may be the handler of an earlier one.
    """
    theirs = getattr(before, "__module__", None) == "torch.utils.data._utils.signal_handling"
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if theirs or before is None else before)


def _death_of(workers: Sequence[multiprocessing.process.BaseProcess]) -> str | None:
    """Return a message if one of these processes was killed or crashed, else ``None``."""
    # A message can be cut off, and its files closed, a moment before the process has ended.
    ended = wait([worker.sentinel for worker in workers], 1.0)
    for process in workers:
        process.join(1.0 if process.sentinel in ended else 0.0)
    worker = next((process for process in workers if process.exitcode), None)
    if worker is None or worker.exitcode is None:
        return None
    if worker.exitcode == -signal.SIGBUS:
        cause = "a data file was truncated while it was read, or /dev/shm is full; fix that"
    else:
        cause = (
            "this machine ran out of memory, or somebody stopped it; fewer data.workers and a smaller data.prefetch "
            "need less memory"
        )
    how = f" of {signal.Signals(-worker.exitcode).name}" if worker.exitcode < 0 else ""
    return f"a worker that reads the data (process {worker.pid}) died{how}: {cause}"


@dataclass
class _Mistake:
    """The message of an error in a worker; an exception would arrive wrapped in a traceback."""

    text: str


@dataclass
class _Delivery:
    """An item packed into one tensor: the bytes of its tensors, then its pickle without them.

    For each tensor that a worker sends, this process opens a file and requests it from the worker, which takes longer
    than copying most tensors. More important, a message for one tensor is short enough to be written at once: if a
    worker is killed in the middle of a longer one, this process would wait for the rest forever.

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
        for tensor, slot in packer.found.values():
            slot.view(content).copy_(tensor)
        content[packer.size :] = pickled
        return _Delivery(content, len(pickled))

    def unpack(self) -> Any:
        return _Unpacker(self.content, self.pickled).load()

    def pin_memory(self) -> _Delivery:
        """Pin the content. Called by DataLoader, in this process."""
        return _Delivery(self.content.pin_memory(), self.pickled)


class _Slot(NamedTuple):
    """A tensor's position in the content, and how to view it."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, content: Tensor) -> Tensor:
        stop = self.start + math.prod(self.shape) * self.dtype.itemsize
        return content[self.start : stop].view(self.dtype).as_strided(self.shape, self.stride)


class _Packer(pickle.Pickler):
    """Pickles an item without its tensors, and assigns each a slot; a tensor that occurs twice gets one."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.found: dict[int, tuple[Tensor, _Slot]] = {}
        self.size = 0

    def persistent_id(self, obj: Any) -> _Slot | None:
        if type(obj) is not Tensor:
            return None
        if id(obj) not in self.found:
            # Contiguous, in the tensor's own memory format.
            stride = torch.empty_like(obj, device="meta").stride()
            self.found[id(obj)] = obj, _Slot(self.size, obj.dtype, tuple(obj.shape), stride)
            self.size += -(-obj.nbytes // _ALIGNED) * _ALIGNED
        return self.found[id(obj)][1]


class _Unpacker(pickle.Unpickler):
    """Unpickles an item, with its tensors as views of the content."""

    def __init__(self, content: Tensor, pickled: int) -> None:
        super().__init__(io.BytesIO(content[len(content) - pickled :].numpy().tobytes()))
        self.content = content
        self.found: dict[_Slot, Tensor] = {}

    def persistent_load(self, slot: _Slot) -> Tensor:
        if slot not in self.found:
            self.found[slot] = slot.view(self.content)
        return self.found[slot]


class _Deliveries(Dataset[_Delivery]):
    """The items of a dataset, packed, with errors turned into messages."""

    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> _Delivery:
        return _Delivery.pack(self.item(index))

    def item(self, index: int) -> Any:
        try:
            return self.items[index]
        except UserError as error:
            return _Mistake(str(error))
        except OSError as error:
            # Unreadable images are bad samples, so this is the file of the samples themselves.
            file = error.filename or "a data file"
            reason = error.strerror or error
            return _Mistake(f"{file} cannot be read any more: {reason}; put it back, and start again to resume the run")


def _unchanged(value: Any) -> Any:
    return value


def _start_worker(_: int) -> None:
    # The terminal and the launcher signal the whole process group. The training decides when to stop, and continues
    # reading until it has written its checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Never destroy objects inherited from the training: that could wait for its communication threads, which do not
    # exist in this process.
    gc.freeze()
