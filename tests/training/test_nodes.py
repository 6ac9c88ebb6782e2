"""Two nodes with a rank each, as launchers start them from a hostfile, train what one rank alone does."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.launch import reserved_port
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    return folder, tiny.write_data(folder / "data"), tiny.write_teacher(folder / "teacher")


@pytest.fixture(scope="module")
def alone(material):
    folder, data, teacher = material
    processes = Processes("cpu")
    train(RunConfig.model_validate(tiny.config(folder / "alone", data, teacher, deepspeed__stage=2)), processes)
    processes.close()
    return losses(folder / "alone")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def deepspeed_launch(node, port):
    """What ``deepspeed --hostfile`` runs on each node of the file, there by ssh."""
    world = base64.urlsafe_b64encode(json.dumps({"127.0.0.1": [0], "localhost": [0]}).encode()).decode()
    words = [f"--world_info={world}", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return ["deepspeed.launcher.launch", *words, "--module"]


def torchrun(node, port):
    words = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", "--master-addr=127.0.0.1"]
    return ["torch.distributed.run", *words, f"--master-port={port}", "-m"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [deepspeed_launch, torchrun])
def test_two_nodes(material, alone, launcher):
    folder, data, teacher = material
    out = folder / launcher.__name__
    path = folder / f"{launcher.__name__}.yaml"
    path.write_text(yaml.safe_dump(tiny.config(out, data, teacher, deepspeed__stage=2)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    with reserved_port() as port:
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", *launcher(node, port), "vlm_distill.train", str(path)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for node in range(2)
        ]
        told = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "on 2 rank(s), ZeRO 2" in " ".join(told[0].split())
    assert "step 1/" not in told[1]  # one rank of all tells
    assert losses(out) == pytest.approx(alone, rel=1e-5)
