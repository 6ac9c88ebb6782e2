"""What is installed from a wheel: every configuration that ships, and a demo that needs no repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("vlm_distill", "data", "vision", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the packages as a wheel has them."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", source / "dist", source], check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, wheel], check=True)
    return folder


def run(installed, folder, *words, timeout=60):
    """Run ``vlm-distill WORDS`` of the installed package in another folder; return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "200"}
    command = [sys.executable, "-m", "vlm_distill.cli", *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_installed_package_has_the_files_that_commands_read(installed, tmp_path):
    assert contents(installed / "vlm_distill" / "configs") == contents(ROOT / "configs")
    templates = Path("vlm_distill", "reporting", "templates")
    assert contents(installed / templates) == contents(ROOT / templates)
    assert run(installed, tmp_path, "configs", "demo", "configs").splitlines()[0] == "configs/demo/cross_entropy.yaml"
    # The base of the classifiers' demo comes with those that build on it.
    assert contents(tmp_path / "configs" / "demo") == contents(ROOT / "configs" / "demo")


@pytest.mark.slow
def test_the_demo_runs_in_an_empty_folder(installed, tmp_path):
    said = run(installed, tmp_path, "demo", timeout=3000)
    assert "TAID − cross-entropy: +" in said
    assert {path.name for path in (tmp_path / "runs" / "demo").iterdir()} >= {"taid", "student", "report.html"}
    row = json.loads((tmp_path / "runs/demo/data/test.jsonl").read_text().partition("\n")[0])
    answer = run(installed, tmp_path, "ask", "runs/demo/student", row["image"], "what shape is present?")
    assert answer.split()[0] in ("circle", "rectangle", "triangle")
