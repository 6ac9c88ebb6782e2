"""The shipped recipes hold the numbers of the papers' code, name the figures they aim at, and start."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch

from vision.build import build_terms, load_model
from vision.classifier import load_classifier
from vision.config import ClassifierConfig
from vision.losses import CrossEntropy
from vision.optimizer import Schedule
from vision.task import ClassificationTask
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.file import load_config
from vlm_distill.training.optimizers import classifier_optimizer

CONFIGS = Path("configs")
FILES = [
    path
    for folder in ("imagenet", "cifar100")
    for path in sorted((CONFIGS / folder).rglob("*.yaml"))
    if path.parent.name != "base"
]
METHODS = ("kd", "ctkd", "dkd", "mlkd", "taid")

#: The TAID paper's tables: top-1 accuracies in the order of METHODS. And the beta of DKD in mdistiller's files.
CIFAR100 = {
    "resnet56_resnet20": ("70.66", "71.19", "71.97", "72.19", "72.25"),
    "resnet110_resnet32": ("73.08", "73.52", "74.11", "74.11", "73.51"),
    "resnet32x4_resnet8x4": ("73.33", "73.39", "76.32", "77.08", "74.85"),
    "wrn_40_2_wrn_16_2": ("74.92", "75.45", "76.24", "76.63", "75.81"),
    "wrn_40_2_wrn_40_1": ("73.54", "73.93", "74.81", "75.35", "74.51"),
    "vgg13_vgg8": ("72.93", "73.52", "74.68", "75.18", "74.38"),
}
#: mdistiller's table of students of another architecture: top-1 of KD and DKD. TAID has no figure there.
OTHER_ARCHITECTURES = {
    "resnet32x4_shufflenet_v1": {"kd": "74.07", "dkd": "76.45"},
    "resnet32x4_shufflenet_v2": {"kd": "74.45", "dkd": "77.07"},
    "wrn_40_2_shufflenet_v1": {"kd": "74.83", "dkd": "76.70"},
    "vgg13_mobilenet_v2": {"kd": "67.37", "dkd": "69.71"},
    "resnet50_mobilenet_v2": {"kd": "67.35", "dkd": "70.35"},
}
IMAGENET = {
    "resnet34_resnet18": ("71.03", "71.38", "71.70", "71.90", "72.10"),
    "resnet50_mobilenet_v1": ("70.50", "71.16", "72.05", "73.01", "72.71"),
}
TEACHERS = {
    **{"resnet56": "72.34", "resnet110": "74.31", "resnet32x4": "79.42", "resnet50": "79.34"},
    **{"wrn_40_2": "75.61", "vgg13": "74.64"},
}
BETA = {
    **{"resnet56_resnet20": 2, "resnet110_resnet32": 2, "resnet32x4_resnet8x4": 8},
    **{"wrn_40_2_wrn_16_2": 6, "wrn_40_2_wrn_40_1": 6, "vgg13_vgg8": 6},
    **{"resnet34_resnet18": 0.5, "resnet50_mobilenet_v1": 2},
    **{"resnet32x4_shufflenet_v1": 8, "resnet32x4_shufflenet_v2": 8, "wrn_40_2_shufflenet_v1": 8},
    **{"vgg13_mobilenet_v2": 6, "resnet50_mobilenet_v2": 8},
}
FIGURES = {
    **{("cifar100", pair): dict(zip(METHODS, figures, strict=True)) for pair, figures in CIFAR100.items()},
    **{("cifar100", pair): {**figures, "taid": None} for pair, figures in OTHER_ARCHITECTURES.items()},
    **{("imagenet", pair): dict(zip(METHODS, figures, strict=True)) for pair, figures in IMAGENET.items()},
}
RUNS = [(folder, pair, method) for (folder, pair), figures in FIGURES.items() for method in figures]

#: lr, epochs, batch size, milestones, weight decay; by data and, where it differs, by method.
SETTINGS = {
    ("cifar100", None): (0.05, 240, 64, [150, 180, 210], 5e-4),
    ("cifar100", "mlkd"): (0.025, 240, 64, [150, 180, 210], 5e-4),
    ("imagenet", None): (0.2, 100, 512, [30, 60, 90], 1e-4),
    ("imagenet", "ctkd"): (0.1, 120, 256, [30, 60, 90], 1e-4),
    ("imagenet", "mlkd"): (0.1, 100, 512, [30, 60, 90], 1e-4),
}
#: Weight and parameters of the loss, and the weight of cross-entropy, which of two views is the mean, not the sum.
LOSSES = {
    ("cifar100", "kd"): (0.9, {"temperature": 4}, 0.1),
    ("cifar100", "ctkd"): (0.9, {"t_start": 1, "t_range": 20, "loops": 10}, 0.1),
    ("cifar100", "dkd"): (1, {"alpha": 1, "temperature": 4, "warmup_epochs": 20}, 1),
    ("cifar100", "mlkd"): (0.9, {"temperatures": [4, 3, 5, 2, 6], "variant": "published"}, 2 * 0.1),
    ("cifar100", "taid"): (0.9, {"t_start": 0.4, "t_end": 1, "schedule": "paper"}, 0.1),
    ("imagenet", "kd"): (0.5, {"temperature": 1}, 0.5),
    ("imagenet", "ctkd"): (1, {"t_start": 1, "t_range": 20, "loops": 5}, 1),
    ("imagenet", "dkd"): (1, {"alpha": 1, "temperature": 1, "warmup_epochs": 1}, 1),
    ("imagenet", "mlkd"): (0.5, {"temperatures": [1, 3, 5, 2, 6], "variant": "published"}, 2 * 0.5),
    ("imagenet", "taid"): (0.5, {"t_start": 0.4, "t_end": 1, "schedule": "paper"}, 0.5),
}


def read(path, *overrides):
    return load_config(path, overrides, ClassifierConfig)


def comment(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return " ".join(line.removeprefix("#").strip() for line in lines)


def known(section):
    if section.source == "open_clip":
        return (section.name, section.pretrained) in open_clip.list_pretrained()
    return section.name in timm.list_pretrained() if section.pretrained else timm.is_model(section.name)


def test_all_of_the_table_is_there():
    expected = {f"{folder}/{pair}/{method}" for folder, pair, method in RUNS}
    expected |= {f"cifar100/{teacher}" for teacher in TEACHERS}
    expected |= {"imagenet/deit_tiny_distilled", "imagenet/clip_vit_l_resnet50"}
    assert {str(path.relative_to(CONFIGS).with_suffix("")) for path in FILES} == expected


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_recipe_is_valid(path):
    config = read(path)
    terms = build_terms(config)
    assert isinstance(terms[-1].loss, CrossEntropy)
    assert config.teacher is None or known(config.teacher)
    assert known(config.student)
    assert not config.student.pretrained
    for ranks in (1, 8):
        split_batch(config, ranks)
    assert config.training.batch_size % config.data.repeats == 0
    assert config.output == str(Path("runs") / path.relative_to(CONFIGS).with_suffix(""))


@pytest.mark.parametrize(("folder", "pair", "method"), RUNS)
def test_a_recipe_has_the_numbers_of_its_source(folder, pair, method):
    path = CONFIGS / folder / pair / f"{method}.yaml"
    config = read(path)
    told = comment(path)
    figure = FIGURES[folder, pair][method]
    assert told.startswith(f"{'KD' if method == 'kd' else method.upper()}, ")
    assert (f"aims at {figure} % top-1" if figure else "no figure is published") in told
    assert ("ours" in told) == (method in ("taid", "mlkd") or path.match("resnet50_mobilenet_v1/ctkd.yaml"))

    optimizer, training = config.optimizer, config.training
    found = (optimizer.lr, training.epochs, training.batch_size, optimizer.milestones, optimizer.weight_decay)
    expected = SETTINGS.get((folder, method), SETTINGS[folder, None])
    assert found == ((0.01, *expected[1:]) if pair in OTHER_ARCHITECTURES else expected)
    assert (optimizer.name, optimizer.momentum, optimizer.decay) == ("momentum", 0.9, "all")
    assert (optimizer.decay_rate, optimizer.warmup_epochs, training.dtype) == (0.1, 0, "fp32")

    weight, parameters, cross_entropy = LOSSES[folder, method]
    if method == "dkd":
        parameters = {**parameters, "beta": BETA[pair]}
    first, second = config.loss
    given = first.model_dump(exclude_defaults=True, exclude={"name"})
    assert (first.name, {"weight": 1.0} | given) == (method, {"weight": weight, **parameters})
    assert (second.name, second.weight) == ("cross_entropy", cross_entropy)

    views = config.data.views
    assert len(views) == (2 if method == "mlkd" else 1)
    assert [view.auto_augment is not None for view in views] == [False, True][: len(views)]
    assert all(view.crop == ("pad" if folder == "cifar100" else "random_resized") for view in views)
    assert all(not view.color_jitter and view.hflip == 0.5 for view in views)

    teacher, student = re.fullmatch(r"(resnet[\dx]+|wrn_40_2|vgg13)_(.+)", pair).groups()
    if folder == "cifar100":
        assert (config.teacher.name, config.student.name) == (f"cifar_{teacher}", f"cifar_{student}")
        published = "ResNet50" if teacher == "resnet50" else teacher
        assert f"/{published}_vanilla/" in config.teacher.weights
    else:
        assert config.teacher.name == f"{teacher}.tv_in1k"
        assert config.student.name.split(".")[0] == student


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_teacher_is_trained_by_the_same_recipe(teacher):
    path = CONFIGS / "cifar100" / f"{teacher}.yaml"
    config = read(path)
    assert f"aims at {TEACHERS[teacher]} % top-1" in comment(path)
    like = read(CONFIGS / "cifar100" / "resnet56_resnet20" / "kd.yaml")
    assert (config.optimizer, config.training, config.data) == (like.optimizer, like.training, like.data)
    assert (config.teacher, config.student.name) == (None, f"cifar_{teacher}")
    # What its run writes stands for the published weights.
    student = read(
        CONFIGS / "cifar100" / "resnet56_resnet20" / "kd.yaml", f"teacher.name={config.output}", "teacher.weights=null"
    )
    assert (student.teacher.name, student.teacher.weights) == (f"runs/cifar100/{teacher}", None)


def test_deit_is_the_recipe_of_its_code():
    path = CONFIGS / "imagenet" / "deit_tiny_distilled.yaml"
    config = read(path)
    assert "aims at 74.5 % top-1" in comment(path)
    assert config.optimizer.lr == 5e-4 * config.training.batch_size / 512
    assert (config.optimizer.name, config.optimizer.weight_decay, config.training.epochs) == ("adamw", 0.05, 300)
    assert {section.name: section.weight for section in config.loss} == {"hard_labels": 0.5, "cross_entropy": 0.5}
    assert load_model(config.student, [str(i) for i in range(1000)], "student").inputs.crop_pct == 224 / 256
    assert "no figure is published" in comment(path.with_name("clip_vit_l_resnet50.yaml")).lower()


def test_students_of_imagenet_are_evaluated_as_torchvision_does():
    for pair in IMAGENET:
        inputs = load_model(
            read(CONFIGS / "imagenet" / pair / "kd.yaml").student, [str(i) for i in range(1000)], "student"
        ).inputs
        assert (inputs.size, inputs.crop_pct, inputs.interpolation) == ((224, 224), 0.875, "bilinear")


def test_the_rate_falls_after_the_milestones():
    optimizer = read(CONFIGS / "cifar100" / "resnet56_resnet20" / "kd.yaml").optimizer
    epoch = 782
    schedule = Schedule(optimizer, 240 * epoch, epoch)
    starts = [0, 150 * epoch, 180 * epoch, 210 * epoch]
    assert [schedule(step) for step in starts] == pytest.approx([0.05, 5e-3, 5e-4, 5e-5])
    assert [schedule(step - 1) for step in [*starts[1:], 240 * epoch]] == pytest.approx([0.05, 5e-3, 5e-4, 5e-5])


def test_everything_decays_that_is_learnt():
    """As in the papers' code, where CTKD's temperature is a parameter like others."""
    config = read(CONFIGS / "cifar100" / "resnet56_resnet20" / "ctkd.yaml")
    task = ClassificationTask(load_classifier("cifar_resnet20", num_classes=100), build_terms(config))
    groups = classifier_optimizer(task.student.model, task.losses, config.optimizer, stage=0).param_groups
    assert {group["weight_decay"] for group in groups} == {5e-4}
    assert sum(len(group["params"]) for group in groups) == len(list(task.parameters()))


def test_a_recipe_starts_as_it_is(tmp_path):
    data, teachers = tmp_path / "cifar-100-binary", tmp_path / "cifar_teachers"
    data.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 16)):
        records = rng.integers(0, 256, (count, 2 + 3 * 32 * 32), dtype=np.uint8)
        records[:, 1] = np.arange(count)
        records.tofile(data / f"{split}.bin")
    weights = teachers / "resnet56_vanilla" / "ckpt_epoch_240.pth"
    weights.parent.mkdir(parents=True)
    torch.save({"epoch": 240, "model": timm.create_model("cifar_resnet56").state_dict()}, weights)
    recipe = "configs/cifar100/resnet56_resnet20/dkd.yaml"
    small = ["training.epochs=1", "training.batch_size=32", "training.device=cpu", "data.workers=0"]
    ran = subprocess.run(
        [sys.executable, "-m", "vision.train", recipe, *small, f"output={tmp_path / 'run'}"],
        env={**os.environ, "CIFAR100": str(data), "CIFAR_TEACHERS": str(teachers)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "taken to be in the same order" not in ran.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if line["kind"] == "train")
    assert (first["lr"], first["epoch"], second["epoch"]) == (0.05, 0.5, 1.0)
    # The distillation term counts a twentieth in the first of 20 epochs.
    assert first["loss"] == pytest.approx(first["dkd/loss"] / 20 + first["cross_entropy/loss"], rel=1e-5)
    for who in ("student", "teacher"):
        assert json.loads((tmp_path / "run" / "evaluation" / "test" / who / "scores.json").read_text())["n"] == 16
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
