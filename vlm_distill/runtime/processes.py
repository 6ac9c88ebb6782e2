"""The ranks of a run: who they are, which device each has, and what they exchange."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import UserError

from . import slurm
from .launch import cores
from .rank_share import RankShare
from .watchdog import Watch

T = TypeVar("T")


class Processes:
    """The ranks of this run and what they exchange.

    Ranks are read from the environment that DeepSpeed's launcher, torchrun or srun made. Without one of them, the run
    is a single process. A process group that the program has opened before is used, and left open.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout: minutes that a rank waits for the others.

    Attributes:
        rank, world: this rank's number, and the number of ranks.
        device: this rank's.
        watch: what the ranks know of each other.
        at_close: what is closed with this object, however the run ends.

    Raises:
        UserError: CUDA was asked for and there is none, or the port at which the ranks meet is taken or unknown.
    """

    def __init__(self, device: str = "auto", timeout: float = 30) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("training.device: cuda was asked for, but PyTorch finds no CUDA device; use cpu or auto")
        slurm.adopt_step()
        self._own_group = not dist.is_initialized()
        self._added = {} if "RANK" in os.environ else _missing_environment()
        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        self.device = _take_device(device, self.world)
        self.at_close = ExitStack()
        if self._own_group:
            # A minute longer than the watch waits: it names the rank that is missing, torch's own timeout does not.
            self._meet(timedelta(minutes=timeout + 1))
        self.watch = Watch(self.rank, self.world, 60 * timeout)

    def _meet(self, limit: timedelta) -> None:
        """Open the process group. Raise ``UserError`` if another program listens at the port of the first rank."""
        cuda = self.device.type == "cuda"
        backend = "nccl" if cuda else "gloo"
        if self._added:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
            return
        try:
            # Bound to its device, a group needs no guess which GPU a barrier may use. Alone, there is nobody to reach.
            dist.init_process_group(backend, timeout=limit, device_id=self.device if cuda and self.world > 1 else None)
        except dist.DistNetworkError as error:
            if "address already in use" not in str(error).lower():
                raise
            raise UserError(
                f"MASTER_PORT: port {os.environ['MASTER_PORT']} of this machine is taken, perhaps by another run; "
                "give the launcher another (--master_port of deepspeed), or wait for that run"
            ) from None

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def share(self) -> RankShare:
        """This rank's share of work that is dealt in batches."""
        return RankShare(self.rank, self.world, self.gather)

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Return the sum of each number or 0-d tensor over all ranks, in float64; waits for the device once."""
        tensors = [(i, v) for i, v in enumerate(values) if isinstance(v, Tensor)]
        if self.world == 1 and not tensors:
            return [float(v) for v in values]
        # All numbers cross to the device in one copy.
        numbers = [0.0 if isinstance(v, Tensor) else v for v in values]
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if tensors:
            own = torch.stack([v.to(self.device, torch.float64) for _, v in tensors])
            tensor = torch.cat([tensor, own])
        with self.watch.waiting():
            if self.world > 1:
                dist.all_reduce(tensor)
            sums = tensor.tolist()
        for (i, _), total in zip(tensors, sums[len(values) :], strict=True):
            sums[i] = total
        return sums[: len(values)]

    def seed(self, seed: int) -> None:
        """Seed torch's random numbers on the CPU and on this rank's device."""
        # torch.manual_seed also queues a seed for every device type that is absent: a fifth of a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(seed)

    def gather(self, item: Any) -> list[Any]:
        """Return every rank's item, on every rank, in the order of ranks."""
        items = [item] * self.world
        if self.world > 1:
            with self.watch.waiting():
                dist.all_gather_object(items, item)
        return items

    def on_first(self, work: Callable[[], T]) -> T:
        """Return on every rank what ``work`` returns on the first; its ``UserError`` is raised on all. Collective."""
        answer: tuple[T | None, str | None] = None, None
        if self.first:
            try:
                answer = work(), None
            except UserError as error:
                answer = None, str(error)
        result, mistake = self.gather(answer)[0]
        if mistake is not None:
            raise UserError(mistake)
        return cast(T, result)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return all ranks' rows ``[n, …]``, one rank after the other; gradients flow to this rank's own rows alone."""
        if self.world == 1:
            return rows
        counts = [int(count) for count in self.gather(len(rows))]
        padded = rows.detach().new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
        parts[self.rank] = rows
        return torch.cat(parts)

    def neighbours(self, size: int) -> Any:
        """Return the process group of this rank and its neighbours, ``size`` ranks each. Collective."""
        # Every rank takes part in making every group.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, self.world, size)]
        return groups[self.rank // size]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with self.watch.waiting():
                dist.barrier()

    def close(self) -> None:
        """Leave the process group that the constructor opened, and remove from the environment what it added."""
        self.at_close.close()
        self.watch.close()
        if self._own_group and dist.is_initialized():
            dist.destroy_process_group()
        # Processes started from here must not take this one's rank for theirs.
        for name in self._added:
            os.environ.pop(name, None)


def _missing_environment() -> dict[str, str]:
    """Set and return the variables that a launcher would have set. DeepSpeed reads them all.

    They are those of one process, where nothing listens at the port, or of the process group that is open.

    Raises:
        UserError: the open group has several ranks, and nobody knows where they can meet.
    """
    added = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"RANK: this program's process group has {dist.get_world_size()} ranks, and no launcher has set RANK and "
            "MASTER_PORT; start the program with torchrun"
        )
    os.environ.update(added)
    return added


def _take_device(wanted: str, world: int) -> torch.device:
    """Return this rank's device: its own GPU, or the CPU with its share of the cores."""
    if torch.cuda.is_available() and wanted != "cpu":
        local = own_gpu(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(local)  # DeepSpeed chooses by it, too
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        # Oversubscribed threads are many times slower: every rank gets its share of the cores.
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
        torch.set_num_threads(max(1, cores() // on_this_machine))
    return torch.device("cpu")


def own_gpu(local: int, visible: int) -> int:
    """Return which of the ``visible`` GPUs belongs to the rank with number ``local`` on this machine."""
    if local < visible:
        return local
    if visible == 1 and slurm.is_task():
        return 0  # srun --gpus-per-task=1 shows each task its own GPU alone
    raise UserError(
        f"LOCAL_RANK: rank {local} of this machine sees {visible} GPU{'s'[: visible != 1]}; start no more ranks on a "
        "machine than it has GPUs"
    )
