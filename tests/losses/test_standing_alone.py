"""The losses inside another project, which has packages called ``data`` and ``vision`` of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USE_LOSSES = """
import sys

import torch
from torch import nn

import data
import vision
import vlm_distill
from vlm_distill import losses


class Head:
    scale, softcap, bias = 1.0, None, None

    def __init__(self, linear):
        self.linear = linear

    def weight(self):
        from contextlib import nullcontext

        return nullcontext(self.linear.weight)


student, teacher = nn.Linear(8, 31, bias=False), nn.Linear(12, 31, bias=False)
hidden = torch.randn(5, 8, requires_grad=True)
targets = losses.HiddenTargets(torch.randn(5, 12), Head(teacher))
sums = losses.fused_linear(losses.build("taid", t_start=0.4), hidden, Head(student), targets)
sums.loss.backward()
assert sums.terms["loss"].count == 5
assert hidden.grad.abs().sum() > 0
assert student.weight.grad.abs().sum() > 0
try:
    losses.build("taid", t_strat=0.4)
except ValueError as error:
    print(error)
ours = [name for name in sys.modules if name.split(".")[0] in ("data", "vision", "vlm_distill")]
print(sorted({".".join(name.split(".")[:2]) for name in ours}))
"""


@pytest.fixture
def project(tmp_path):
    for name in ("data", "vision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    return tmp_path


def start(project, *words):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, *words], cwd=project, env=environment, capture_output=True, text=True)


def test_the_losses_need_nothing_else_of_ours(project):
    (project / "use.py").write_text(USE_LOSSES)
    done = start(project, "use.py")
    assert done.returncode == 0, done.stderr
    mistake, modules = done.stdout.splitlines()
    assert mistake.startswith("loss taid has no parameter 't_strat' (did you mean 't_start'?)")
    assert modules == "['data', 'vision', 'vlm_distill', 'vlm_distill.losses', 'vlm_distill.version']"


@pytest.mark.parametrize("module", ["train", "cache", "eval", "generate", "cli", "demo"])
def test_commands_refuse_a_shadowed_package(project, module):
    done = start(project, "-m", f"vlm_distill.{module}", "run.yaml")
    assert done.returncode != 0
    shadow = project / "data" / "__init__.py"
    assert f"vlm-distill's package 'data' is shadowed by {shadow}: start from another folder" in done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "from vlm_distill.models import load_vlm",
        "import vlm_distill.evaluation.answering",
        "import vlm_distill; vlm_distill.distill(student='x', data='y', output='z')",
        "import vlm_distill; vlm_distill.evaluate('x', data='y')",
    ],
)
def test_the_rest_of_the_package_refuses_it_too(project, statement):
    done = start(project, "-c", statement)
    assert "vlm-distill's package 'data' is shadowed by" in done.stderr


def test_classification_refuses_a_shadowed_vision(project):
    (project / "data" / "__init__.py").unlink()
    (project / "data").rmdir()
    (project / "run.yaml").write_text("")
    done = start(project, "-c", "from vlm_distill.cli import main; main()", "classify", "run.yaml")
    assert done.returncode != 0
    assert f"vlm-distill's package 'vision' is shadowed by {project / 'vision' / '__init__.py'}" in done.stderr
