"""Ranks: their sums and seeds, the device that each takes, and the place where they meet."""

import os
import socket

import pytest
import torch

from data.errors import UserError
from vlm_distill.runtime.processes import Processes, own_gpu
from vlm_distill.runtime.slurm import adopt_step, first_host, port_of_step


# The first test: this process is no rank yet.
def test_a_taken_port_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"port {port} of this machine is taken"):
            Processes("cpu")


def test_sums_on_one_rank_keep_their_order(processes):
    values = [1, torch.tensor(2.5), 0.1, torch.tensor(3, dtype=torch.int64), torch.tensor(0.1, dtype=torch.float64)]
    assert processes.sum(values) == [1.0, 2.5, 0.1, 3.0, 0.1]
    assert processes.sum([2, 0.1]) == [2.0, 0.1]


def test_a_seed_is_torch_s_own(processes):
    processes.seed(2**62 + 5)
    drawn = torch.rand(3)
    torch.manual_seed(2**62 + 5)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu7", "gpu7"),
        ("login,gpu[1-2]", "login"),
        ("gpu[03-07,12]", "gpu03"),
        ("gpu[03-07,12]-ib,login", "gpu03-ib"),
        ("rack[1-2]n[04-08]", "rack1n04"),
    ],
)
def test_ranks_of_slurm_meet_at_thefirst_host(hosts, first):
    assert first_host(hosts) == first


def test_a_rank_takes_itsown_gpu(monkeypatch):
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    assert [own_gpu(local, 8) for local in (0, 7)] == [0, 7]
    with pytest.raises(UserError, match="rank 1 of this machine sees 1 GPU; start no more ranks on a machine than"):
        own_gpu(1, 1)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert own_gpu(3, 1) == 0  # srun --gpus-per-task=1
    with pytest.raises(UserError, match="sees 2 GPUs"):
        own_gpu(3, 2)


def test_steps_of_slurm_that_share_a_machine_meet_at_different_ports(monkeypatch):
    found = set()
    for job in (4711, 4712, 4713):
        for step in (0, 1):
            monkeypatch.setenv("SLURM_JOB_ID", str(job))
            monkeypatch.setenv("SLURM_STEP_ID", str(step))
            found.add(port_of_step())
    assert len(found) == 6
    assert all(10_000 <= port < 29_000 for port in found)


def test_a_task_of_srun_takes_its_rank_and_keeps_what_is_set(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    given = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    for name, value in {**given, "SLURM_STEP_NODELIST": "gpu[03-04]", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    adopt_step()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["5", "1", "8", "gpu03", "1234"]
