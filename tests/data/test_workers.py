"""Worker processes: their state, and the message when one dies."""

import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from data.batch import ModelInputs
from data.errors import UserError
from data.workers import make_loader


class WorkerState(torch.utils.data.Dataset):
    """Return the state of a worker process, after signals to it."""

    def __getitem__(self, index):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        time.sleep(0.01)
        return torch.get_num_threads(), os.getpid()


def test_workers_take_one_thread_and_outlive_signals():
    states = list(make_loader(WorkerState(), 0, 4, workers=1))
    assert {threads for threads, _ in states} == {1}
    assert len({process for _, process in states}) == 1
    assert states[0][1] != os.getpid()


class Numbers(torch.utils.data.Dataset):
    """Items with too many tensors for DataLoader's own message to fit into a pipe."""

    def __getitem__(self, index):
        return [torch.full((3,), index) for _ in range(3000)], os.getpid()


@pytest.mark.parametrize("wait", [0, 1], ids=["at_work", "ahead"])
@pytest.mark.parametrize("others", [False, True], ids=["first", "after_another_loader"])
def test_a_killed_worker_is_told_at_the_next_item_and_nowhere_else(monkeypatch, others, wait):
    if others:
        # DataLoader leaves its handler, which raises wherever the process is, at the first use in a process.
        before = signal.getsignal(signal.SIGCHLD)
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
        for _ in DataLoader(range(2), num_workers=1):
            pass
        assert signal.getsignal(signal.SIGCHLD) != before
    loader = make_loader(Numbers(), 0, 100, workers=1, prefetch=4)
    _, process = next(loader)
    time.sleep(wait)
    os.kill(process, signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(UserError, match=f"a worker that reads the data .process {process}. died of SIGKILL: "):
        for _ in loader:
            pass


class Tensors(torch.utils.data.Dataset):
    def __getitem__(self, index):
        torch.manual_seed(index)
        shared, wide = torch.randn(2, 3), torch.randn(4, 5, 6, 7)
        return ModelInputs(
            shared=shared,
            again=[shared],
            halves=wide.bfloat16(),
            channels_last=wide.contiguous(memory_format=torch.channels_last),
            part=wide[1:3, ::2],
            turned=wide.transpose(0, 3),
            one=torch.tensor(index),
            none=torch.empty(0, 4, dtype=torch.int64),
            flags=wide > 0,
            words=("text", None, index),
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_arrives_as_it_was_made(workers):
    for index, got in enumerate(make_loader(Tensors(), 0, 3, workers=workers)):
        made = Tensors()[index]
        assert type(got) is ModelInputs
        assert list(got) == list(made)
        assert got["again"][0] is got["shared"]
        assert got["words"] == made["words"]
        for name in set(made) - {"again", "words"}:
            assert got[name].dtype == made[name].dtype
            assert torch.equal(got[name], made[name]), name
        assert got["channels_last"].is_contiguous(memory_format=torch.channels_last)
        assert got["turned"].stride() == made["turned"].stride()
        assert got["part"].is_contiguous() or not workers
        got["none"].add_(1)
        got["shared"].add_(1)  # nobody else's
        assert torch.equal(got["flags"], made["flags"])


def test_a_handler_of_somebody_else_stays(monkeypatch):
    def handler(number, frame):
        pass

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        next(make_loader(Numbers(), 0, 2, workers=1))
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)
