"""What a classifier's run is said to cost: against measured tensors, without weights, data or network."""

import json
from pathlib import Path

import by_path
import pictures
import pytest
import yaml

from data.errors import UserError
from vision.config import ClassifierConfig
from vision.planning import plan
from vlm_distill.config.file import load_config

benchmark = by_path.load(Path(__file__).parents[2] / "benchmarks" / "planning.py")
RECIPE = "configs/imagenet/resnet34_resnet18/kd.yaml"


@pytest.mark.parametrize("name", ["resnet", pytest.param("deit", marks=pytest.mark.slow)])
def test_the_peak_is_within_a_tenth_of_what_was_measured(tmp_path, name):
    row = benchmark.compare(name, tmp_path)
    assert row["measured"] > 10e6
    assert abs(row["error"]) < 0.1, row


def test_a_recipe_is_planned_without_data_weights_and_network(command, tmp_path):
    words = ["training.steps=100", "training.batch_size=8", f"output={tmp_path}", "--gpus", "2", "--memory", "24"]
    code, said, _ = command("plan", RECIPE, *words)
    assert code == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    parts = {(part["model"], part["name"]): part for part in found["parts"]}
    # torchvision's numbers of parameters, and of multiplications with additions of an image of 224 pixels.
    assert parts["student", "body"]["parameters"] + parts["student", "head"]["parameters"] == 11_689_512
    assert parts["teacher", "body"]["parameters"] + parts["teacher", "head"]["parameters"] == 21_797_672
    assert parts["teacher", "body"]["trained"] == 0
    # The backward costs twice the forward, but for the first layer, which needs no gradient of the images.
    assert found["flops"] == pytest.approx(8 * 2 * (3 * 1.814e9 + 3.664e9), rel=0.02)
    assert (found["seconds"], found["sequences"], found["steps"]) == (None, None, 100)
    rows = {row["stage"]: row for row in found["memory"]}
    assert rows[0]["optimizer"] == 4 * 11_689_512  # momentum alone
    assert rows[2]["optimizer"] == 8 * 11_689_512 / 2
    assert "100 steps × 8 samples: 0." not in said
    assert "FLOPs/step" in said
    assert "tokens" not in said


def config(folder, **changes):
    plain = pictures.config(folder / "run", folder / "nowhere", None, **changes)
    return ClassifierConfig.model_validate(plain)


def test_what_the_run_could_not_use_is_not_in_the_table(tmp_path):
    student = pictures.vit(num_classes=10)
    lamb = config(tmp_path, student=student, optimizer={"name": "lamb", "lr": 0.1})
    assert [row.stage for row in plan(lamb).memory] == [0]
    plain, averaged = config(tmp_path, student=student), config(tmp_path, student=student, training__ema=0.9)
    assert [row.stage for row in plan(averaged).memory] == [0, 1, 2]
    first, second = plan(plain).memory[0], plan(averaged).memory[0]
    assert second.parameters == 2 * first.parameters
    assert first.optimizer == sum(part.trained for part in plan(plain).parts) * 4


def test_a_head_alone_needs_little_beside_the_weights(tmp_path):
    whole, probe = (
        plan(config(tmp_path, student=pictures.vit(num_classes=10, train=what))).memory[0] for what in ("all", "head")
    )
    assert probe.parameters == whole.parameters
    assert probe.optimizer < 0.1 * whole.optimizer
    assert probe.activations < 0.7 * whole.activations


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"training__steps": None, "training__epochs": 3},
            "cannot plan training.epochs: .*nowhere .data.train. was",
        ),
        ({}, "data.train, which gives the number of classes, was not found; set student.num_classes"),
        (
            {"student": {"name": "resnet17", "num_classes": 3}},
            "student: classifier: 'resnet17' is neither a folder",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        plan(config(tmp_path, **changes))


def test_data_that_is_there_gives_steps_and_classes(tmp_path):
    images = pictures.make_images(tmp_path / "images", per_class=4)
    plain = pictures.config(tmp_path / "run", images, None)
    plain["training"] = {"epochs": 2, "batch_size": 16}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    found = plan(load_config(tmp_path / "run.yaml", (), ClassifierConfig), memory=1, device="cpu")
    assert found.steps == 2 * 3
    assert {part.name: part.parameters for part in found.parts}["head"] == 16 * 10 + 10
