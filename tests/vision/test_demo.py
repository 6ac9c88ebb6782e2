"""The demo of classifiers: its data, its configurations, and a miniature of it."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data.classification import open_images
from data.errors import UserError
from data.images import load_image
from vision import demo
from vision.build import build_terms
from vision.classifier import load_classifier
from vision.config import ClassifierConfig
from vlm_distill.config.file import load_config
from vlm_distill.config.shipped import FOLDER

CONFIGS = FOLDER / "demo" / "vision"
DIGITS = pytest.importorskip("sklearn.datasets")


@pytest.fixture
def _no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "FASHION", tmp_path / "usr" / "share" / "datasets" / "fashion-mnist")
    monkeypatch.setattr(demo.shutil, "which", lambda _: None)


def write_idx(folder: Path, count: int = 40) -> Path:
    """A data set of noise in Fashion-MNIST's files."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels, labels = draw.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
            content = gzip.compress(head + values.astype(np.uint8).tobytes())
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    return folder


@pytest.mark.usefixtures("_no_package")
def test_digits_where_fashion_mnist_cannot_be_had(tmp_path: Path) -> None:
    path, title = demo.prepare(tmp_path / "data")
    assert title == "scikit-learn's digits"
    train, test = (open_images(path, split=split) for split in ("train", "test"))
    assert train.classes == test.classes == tuple("0123456789")
    assert (len(train), len(test)) == (1437, 360)
    # Written as they are: sixteen greys above black, stretched over a byte.
    digits = DIGITS.load_digits()
    row = next(row for row in range(len(test)) if test[row].label == digits.target[0])
    assert np.array_equal(
        np.asarray(load_image(test[row].image).convert("L")), (digits.images[0] * 255 / 16).round().astype("uint8")
    )


def test_fashion_mnist_where_the_package_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = write_idx(tmp_path / "share" / "fashion-mnist")
    monkeypatch.setattr(demo, "FASHION", installed)
    assert demo.prepare(tmp_path / "data") == (installed, "Fashion-MNIST")
    assert not (tmp_path / "data").exists()
    assert "Ankle boot" in open_images(installed, split="train").classes


def test_fashion_mnist_is_unpacked_from_a_package_that_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "FASHION", Path("/nowhere/fashion-mnist"))
    monkeypatch.setattr(demo.shutil, "which", lambda word: f"/bin/{word}")
    commands: list[list[str]] = []

    def fake(command: list[str], *, cwd: Path, **_: object) -> None:
        commands.append(command)
        if command[0] == "apt-get":
            (cwd / "dataset-fashion-mnist_1_all.deb").touch()
        else:
            write_idx(cwd / "nowhere" / "fashion-mnist")

    monkeypatch.setattr(demo.subprocess, "run", fake)
    expected = (tmp_path / "nowhere" / "fashion-mnist", "Fashion-MNIST")
    assert demo.prepare(tmp_path) == expected
    assert commands[1] == ["dpkg-deb", "-x", "dataset-fashion-mnist_1_all.deb", "."]
    assert demo.prepare(tmp_path) == expected
    assert len(commands) == 2, "it is fetched once"


def test_a_failing_download_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FASHION", Path("/nowhere/fashion-mnist"))
    monkeypatch.setattr(demo.shutil, "which", lambda word: f"/bin/{word}")

    def fail(command: list[str], **_: object) -> None:
        raise demo.subprocess.CalledProcessError(100, command)

    monkeypatch.setattr(demo.subprocess, "run", fail)
    assert demo.prepare(tmp_path)[1] == "scikit-learn's digits"


@pytest.mark.usefixtures("_no_package")
def test_without_any_data_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"dataset-fashion-mnist.*vlm-distill\[demo\]"):
        demo.prepare(tmp_path)


@pytest.mark.parametrize("name", ["teacher", *demo.METHODS])
def test_configurations_are_valid_and_differ_in_the_loss_alone(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", [], ClassifierConfig)
    base = load_config(CONFIGS / "alone.yaml", [], ClassifierConfig)
    build_terms(config)
    student = config.student.model_dump(exclude={"name", "train"})
    model = load_classifier(config.student.name, num_classes=10, image_size=16, config=student["config"])
    assert sum(p.numel() for p in model.parameters()) == (78_042 if name == "teacher" else 10_226)
    assert (config.teacher is None) == (name in ("teacher", "alone"))
    assert config.data == base.data
    if name != "teacher":
        assert (config.student, config.training) == (base.student, base.training)


@pytest.mark.usefixtures("_no_package")
def test_a_miniature_of_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ["training.steps=2", "training.batch_size=8", "data.train.0.limit=40", "data.eval.0.limit=20"]
    page = demo.run(tmp_path / "out", 2, seeds=(0, 1), overrides=small)
    assert "kd/seed1" in page.read_text("utf-8")
    first = {}
    for name in demo.METHODS:
        for seed in (0, 1):
            folder = tmp_path / "out" / name / f"seed{seed}"
            assert (folder / "student" / "model.safetensors").is_file()
            assert json.loads((folder / "summary.json").read_text("utf-8"))["steps"] == 2
            line = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[0])
            first[name, seed] = {k: v for k, v in line.items() if k.startswith("cross_entropy/")}
    # The same first weights and images whatever the teacher says, and others for another seed.
    assert first["alone", 0] == first["kd", 0] == first["dkd", 0]
    assert first["alone", 0] != first["alone", 1]
    told = capfd.readouterr().err
    assert "TAID" in told
    assert "10,226" in told


@pytest.mark.usefixtures("_no_package")
def test_a_mistake_ends_the_demo_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        demo.run(tmp_path, 1, seeds=(0,), overrides=["optimizer.lr=-1"])
    assert not (tmp_path / "report.html").exists()
