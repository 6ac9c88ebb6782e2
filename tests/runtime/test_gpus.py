"""How many processes a command starts: one for each GPU that it may use, counted without PyTorch."""

import pytest

from vlm_distill.runtime.gpus import process_count, visible_gpus
from vlm_distill.sweeping.running import Machine

LAUNCHERS = ("CUDA_VISIBLE_DEVICES", "RANK", "SLURM_STEP_ID", "SLURM_NTASKS")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with two GPUs, as ``nvidia-smi`` tells of them, outside of any launcher."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0\necho 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tool


def test_there_is_a_process_for_each_gpu_and_it_is_said(machine, capsys):
    assert process_count(None) == 2
    assert capsys.readouterr().err == "vlm-distill: 2 GPUs, a process for each (--nproc sets another number)\n"
    assert process_count(None, "cuda") == 2
    assert process_count(3) == 3


def test_on_a_cpu_there_is_one(machine, capsys):
    assert process_count(None, "cpu") == 1
    machine.write_text("#!/bin/sh\nexit 9\n")
    assert process_count(None) == 1
    machine.unlink()
    assert process_count(None) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("value", "gpus"), [("", []), ("3", ["3"]), ("4, 5,", ["4", "5"]), ("-1", []), ("0,-1,2", ["0"])]
)
def test_visible_devices_are_counted_as_cuda_counts_them(machine, monkeypatch, value, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == gpus
    assert process_count(None) == max(1, len(gpus))


def test_a_rank_of_another_launcher_starts_one_process(machine, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert process_count(None) == 2  # a job script, which srun did not start
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert process_count(None) == 1
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert process_count(None) == 2  # the only task of its step
    monkeypatch.setenv("RANK", "0")
    assert process_count(None) == 1


def test_runs_of_a_sweep_divide_the_gpus(machine):
    assert Machine(at_once=1, nproc=None).environment(0)["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert Machine(at_once=2, nproc=None).environment(1)["CUDA_VISIBLE_DEVICES"] == "1"
