"""The command: what it opens, loads, writes and says; readers and models are small stand-ins."""

import json
import sys
from types import ModuleType

import pytest
import torch
from listed_images import Inputs, Listed, Says, Tiny, broken, numbered
from timm.data import ImageNetInfo

from data.errors import BadSample
from vision import evaluate
from vlm_distill.runtime.rank_share import RankShare

SYNSETS = ImageNetInfo().label_names()


class Single:
    rank, world, device, share = 0, 1, torch.device("cpu"), RankShare()

    def close(self):
        pass


@pytest.fixture
def command(monkeypatch):
    """``command(sources, models)(*arguments)``: sources by path, models by name."""

    def stand_in(sources, models):
        data, classifiers, classes = (ModuleType(name) for name in ("classification", "classifier", "classes"))

        def open_images(path, *, format, split):
            return sources[str(path)]

        def load_classifier(name, **options):
            return models[name]

        class Mapped:
            labels = None

        data.open_images, classifiers.load_classifier = open_images, load_classifier
        classes.map_classes = lambda student, teacher, data, *, student_outputs: Mapped
        monkeypatch.setitem(sys.modules, "data.classification", data)
        monkeypatch.setitem(sys.modules, "vision.classifier", classifiers)
        monkeypatch.setitem(sys.modules, "vision.classes", classes)
        monkeypatch.setattr("vlm_distill.runtime.processes.Processes", Single)
        return lambda *arguments: evaluate.main([*arguments, "--workers", "0"])

    return stand_in


def test_a_student_and_its_teacher(command, tmp_path, capsys):
    student, teacher = Tiny(seed=1), Tiny(seed=2, inputs=Inputs((6, 6)))
    student.num_classes = teacher.num_classes = 10
    run = command({"images": broken()}, {"small": student, "large": teacher})
    assert run("small", "--teacher", "large", "--data", "images", "--out", str(tmp_path), "--batch-size", "4") == 0
    scores = {
        who: json.loads((tmp_path / "listed" / who / "scores.json").read_text()) for who in ("student", "teacher")
    }
    assert scores["student"]["n"] == scores["teacher"]["n"] == 21
    assert 0 <= scores["student"]["agreement"] <= 1
    assert "agreement" not in scores["teacher"]
    assert {image.shape[-1] for image in teacher.seen} == {6}
    said = capsys.readouterr().out
    assert "2 left out, the first: listed, line 5: not an image" in said
    assert f"{scores['student']['exact']:.2%}" in said


def test_a_set_of_imagenet(command, tmp_path):
    source = numbered([0, 1], SYNSETS[1:3], "sketch")
    model = Says(torch.nn.functional.one_hot(torch.tensor([1, 7]), 1000).float(), SYNSETS)
    assert (
        command({"images": source}, {"m": model})("m", "--data", "images", "--set", "sketch", "--out", str(tmp_path))
        == 0
    )
    scores = json.loads((tmp_path / "ImageNet-Sketch" / "student" / "scores.json").read_text())
    assert scores["by_type"] == {"goldfish": {"n": 1, "exact": 1.0}, "great white shark": {"n": 1, "exact": 0.0}}


def test_corruptions(command, tmp_path, capsys):
    folders = [("fog", 1), ("fog", 2), ("snow", 5)]
    sources = {}
    for k, (name, severity) in enumerate(folders):
        path = tmp_path / "c" / name / str(severity)
        path.mkdir(parents=True)
        sources[str(path)] = numbered([0] * 4, SYNSETS[:1], path.name)
        sources[str(path)].items = sources[str(path)].items[k:]
    right = torch.nn.functional.one_hot(torch.tensor([5, 0, 0, 0]), 1000).float()
    run = command(sources, {"m": Says(right, SYNSETS)})
    assert run("m", "--data", str(tmp_path / "c"), "--set", "c", "--out", str(tmp_path / "out")) == 0
    scores = json.loads((tmp_path / "out" / "ImageNet-C" / "student" / "scores.json").read_text())
    assert scores["corruptions"] == {"fog": {"1": 0.75, "2": 1.0}, "snow": {"5": 1.0}}
    assert not (tmp_path / "out" / "ImageNet-C" / "student" / "predictions.jsonl").exists()
    assert "mCE needs all 15 corruptions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "0"], "'--limit': Input should be greater than or equal to 1"),
        (["--set", "a"], "class class 0 is none of ImageNet-A"),
        ([], "no image could be read; the first: listed, line 1: gone"),
    ],
)
def test_mistakes_are_one_line(command, capsys, arguments, said):
    source = Listed([BadSample("gone")], [f"class {k}" for k in range(10)])
    model = Tiny()
    model.num_classes = 10
    assert command({"images": source}, {"m": model})("m", "--data", "images", *arguments) == 2
    told = capsys.readouterr().err.strip()
    assert said in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18"], "resnet18: is a network without trained weights; give --weights FILE, or --pretrained"),
        (["m", "--teacher", "resnet34"], "resnet34: is a network without trained weights; give --teacher-weights"),
        (["ViT-B-32", "--source", "open_clip"], "ViT-B-32: is a network without trained weights"),
        (["m", "--out", __file__], "is a file; give a folder"),
    ],
)
def test_random_numbers_are_not_scored_and_files_not_overwritten(command, capsys, arguments, message):
    assert command({"images": broken()}, {"m": Tiny()})(*arguments, "--data", "images") == 2
    assert message in capsys.readouterr().err
