"""What the engine does on one rank, and of other stages' checkpoints; the port where ranks meet."""

import json
import socket

import pytest
import tiny
import torch
from torch import nn

from data.errors import UserError
from vision.config import ClassifierConfig
from vlm_distill.config.sections import RunConfig
from vlm_distill.training.engine import Engine, Processes, _first_host, _own_gpu, _port_of_step
from vlm_distill.training.trainer import Trainer


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.unread = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, factor):
        return (factor * self.read).sum()


@pytest.fixture
def processes():
    made = Processes("cpu")
    yield made
    made.close()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_parameter_that_no_loss_reaches_is_decayed_as_on_many_ranks(processes, accumulation):
    config = ClassifierConfig.model_validate(
        {
            "student": {"name": "x"},
            "loss": [{"name": "cross_entropy"}],
            "data": {"train": [{"path": "x"}]},
            "training": {"steps": 1, "batch_size": accumulation, "micro_batch_size": 1, "device": "cpu"},
            "output": "x",
        }
    )
    task = Task()
    engine = Engine(task, torch.optim.SGD(task.parameters(), lr=1.0, weight_decay=0.5), config, processes)
    for _ in range(accumulation):
        engine.backward(engine(0.25))
        engine.step(1.0)
    assert task.read.tolist() == [1 - 0.25 * accumulation - 0.5] * 2
    assert task.unread.tolist() == [0.5] * 2


def test_settings_that_deepspeed_refuses_late_are_a_mistake_too(processes):
    config = ClassifierConfig.model_validate(
        {
            "student": {"name": "x"},
            "loss": [{"name": "cross_entropy"}],
            "data": {"train": [{"path": "x"}]},
            "training": {"steps": 1, "batch_size": 1, "device": "cpu"},
            "deepspeed": {"stage": 1, "zero_optimization": {"compute_grad_norm": False}},
            "optimizer": {"max_grad_norm": 1.0},
            "output": "x",
        }
    )
    task = Task()
    with pytest.raises(
        UserError, match=r"deepspeed: DeepSpeed refuses this section: .*compute_grad_norm=false requires"
    ):
        Engine(task, torch.optim.SGD(task.parameters(), lr=1.0), config, processes)


def test_sums_on_one_rank_keep_their_order(processes):
    values = [1, torch.tensor(2.5), 0.1, torch.tensor(3, dtype=torch.int64), torch.tensor(0.1, dtype=torch.float64)]
    assert processes.sum(values) == [1.0, 2.5, 0.1, 3.0, 0.1]
    assert processes.sum([2, 0.1]) == [2.0, 0.1]


def test_a_seed_is_torch_s_own(processes):
    processes.seed(2**62 + 5)
    drawn = torch.rand(3)
    torch.manual_seed(2**62 + 5)
    assert torch.equal(drawn, torch.rand(3))


def test_tied_weights_go_on_at_another_stage(processes, tmp_path):
    data, teacher = tiny.write_data(tmp_path / "data"), tiny.write_teacher(tmp_path / "teacher")

    def trained(name, stage, until=None):
        changes = {"student": tiny.settings(tied=True), "training__steps": 3, "deepspeed__stage": stage}
        changes["deepspeed__zero_optimization"] = {"stage3_param_persistence_threshold": 0}
        out = tmp_path / name
        Trainer(RunConfig.model_validate(tiny.config(out, data, teacher, **changes)), processes).run(until)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    straight = trained("straight", 2)
    trained("moved", 3, until=1)
    assert trained("moved", 2) == pytest.approx(straight, abs=1e-6)


def test_a_taken_port_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"port {port} of this machine is taken"):
            Processes("cpu")


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
def test_ranks_of_slurm_meet_at_the_first_host(hosts, first):
    assert _first_host(hosts) == first


def test_a_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    assert [_own_gpu(local, 8) for local in (0, 7)] == [0, 7]
    with pytest.raises(UserError, match="rank 1 of this machine sees 1 GPU; start no more ranks on a machine than"):
        _own_gpu(1, 1)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert _own_gpu(3, 1) == 0  # srun --gpus-per-task=1
    with pytest.raises(UserError, match="sees 2 GPUs"):
        _own_gpu(3, 2)


def test_steps_of_slurm_that_share_a_machine_meet_at_different_ports(monkeypatch):
    found = set()
    for job in (4711, 4712, 4713):
        for step in (0, 1):
            monkeypatch.setenv("SLURM_JOB_ID", str(job))
            monkeypatch.setenv("SLURM_STEP_ID", str(step))
            found.add(_port_of_step())
    assert len(found) == 6
    assert all(10_000 <= port < 29_000 for port in found)
