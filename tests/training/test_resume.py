"""A run under DeepSpeed's launcher that is killed and started again tells the same story as one never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny
import yaml

from vlm_distill.runtime.launch import reserved_port

STEPS = 30


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    data = tiny.write_data(folder / "data", text_only=(3, 4), broken=(9,))
    with reserved_port() as port:
        yield folder, data, tiny.write_teacher(folder / "t"), port


def start(material, name):
    folder, data, teacher, port = material
    out = folder / name
    plain = tiny.config(
        out,
        data,
        teacher,
        training__steps=STEPS,
        training__checkpoint_every=4,
        deepspeed__stage=2,
        data__eval=[{"path": str(data), "name": "questions"}],
        evaluation__every=6,
        loss=[{"name": "taid", "t_start": 0.2, "alpha": 0.05, "schedule": "paper"}],
    )
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain))
    launcher = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, "--module", "vlm_distill.train", str(folder / f"{name}.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    return process, out / "metrics.jsonl"


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]


def story(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in tiny.TIMES} for line in lines]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(material):
    process, straight = start(material, "straight")
    finish(process)
    told = story(straight)
    assert [line["step"] for line in told if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in told if line["kind"] == "eval"] == [6, 12, 18, 24, 30]

    kill_at = random.randint(5, STEPS - 6)
    process, resumed = start(material, "killed")
    while not resumed.exists() or resumed.read_text().count('"train"') < kill_at:
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process, _ = start(material, "killed")
    finish(process)
    assert story(resumed) == story(straight), f"killed after step {kill_at}"
