"""Signals to what started the ranks: ``vlm-distill train`` says by its exit code that the run was stopped."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

from vlm_distill.runtime.launch import reserved_port
from vlm_distill.training import checkpoint

STEPS = 400
OURS = [sys.executable, "-m", "vlm_distill.cli", "train"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]


def start(folder, command, tail=()):
    data, teacher = tiny.write_data(folder / "data"), tiny.write_teacher(folder / "teacher")
    out = folder / "run"
    # Workers too get the signal from DeepSpeed's launcher, and ignore it.
    changes = {"training__steps": STEPS, "training__checkpoint_every": STEPS, "data__workers": 1}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.config(out, data, teacher, deepspeed__stage=2, **changes)))
    process = subprocess.Popen(
        [*command, str(path), *tail],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "told").open("w"),
        start_new_session=True,
    )
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train"') < 3:
        assert process.poll() is None, (folder / "told").read_text()[-3000:]
        time.sleep(0.05)
    return process, out


def assert_stopped(out, folder):
    told = (folder / "told").read_text()
    ((step, path),) = checkpoint.completed(out / "checkpoints")
    assert f"stopped after step {step} with a checkpoint; start the run again" in told
    assert 3 <= step < STEPS
    assert len(list(path.rglob("*_optim_states.pt"))) == 2
    assert not list(out.rglob("*.unfinished"))
    assert "Traceback" not in told


def test_our_launcher_tells_the_signal(tmp_path):
    process, out = start(tmp_path, OURS, ["--nproc", "2"])
    process.terminate()  # the command alone, which passes it on
    assert process.wait(60) == 128 + signal.SIGTERM, (tmp_path / "told").read_text()[-3000:]
    assert_stopped(out, tmp_path)


def test_ranks_die_with_their_launcher(tmp_path):
    process, _ = start(tmp_path, OURS, ["--nproc", "1", f"training.steps={10**6}"])
    ranks = children(process.pid)
    assert ranks
    process.kill()
    process.wait(10)
    wait_until(lambda: not any(map(running, ranks)))


def children(parent):
    """Ids of a process's children."""
    tasks = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(word) for word in tasks.read_text().split()]


def running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true, seconds=10):
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


@pytest.mark.slow
def test_deepspeeds_launcher_leaves_a_checkpoint(tmp_path):
    with reserved_port() as port:
        process, out = start(tmp_path, [*DEEPSPEED, "--master_port", str(port), "--module", "vlm_distill.train"])
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does; the launcher sends it to its ranks once more
    process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() - began < 60:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert time.monotonic() - began < 30
    assert_stopped(out, tmp_path)
