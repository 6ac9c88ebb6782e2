"""Exports: what timm makes of them, the card, ONNX against torch."""

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from data.errors import UserError
from vision.classifier import load_classifier
from vision.export import About, export, export_run, main

NAMES = [f"class {i}" for i in range(5)]


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    classifier = load_classifier("cifar_resnet8", num_classes=5, classes=NAMES)
    classifier(torch.randn(8, 3, 32, 32))  # moves BatchNorm's statistics
    return classifier.eval()


def test_timm_loads_the_weights(student, tmp_path):
    assert export(student, tmp_path, About("tiny")) is None
    images = torch.randn(2, 3, 32, 32)
    checkpoint = str(tmp_path / "model.safetensors")
    by_path = timm.create_model("cifar_resnet8", checkpoint_path=checkpoint, num_classes=5).eval()
    by_folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for model in (by_path, by_folder):
        torch.testing.assert_close(model(images), student(images).logits)
    assert (tmp_path / "labels.txt").read_text().splitlines() == NAMES


def test_the_code_of_the_card_runs(tmp_path, monkeypatch):
    classifier = load_classifier(
        "resnet10t", num_classes=3, config={"channels": [8, 8, 16, 16], "stem_width": 8}
    ).eval()
    export(classifier, tmp_path, About("narrow"))
    card = (tmp_path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(scope["model"](images), classifier(images).logits)


def front_matter(folder):
    text = (folder / "README.md").read_text()
    return OmegaConf.to_container(OmegaConf.create(text.split("---\n")[1])), text


def test_a_run_tells_the_card(student, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    student.save_pretrained(run / "student")
    config = {
        "student": {"name": "cifar_resnet20"},
        "training": {"steps": 1},
        "output": "run",
        "teacher": {"name": "resnet34.tv_in1k"},
        "loss": [{"name": "cross_entropy", "weight": 0.1}, {"name": "kd", "weight": 0.9, "temperature": 4}],
        "data": {"train": [{"path": "somewhere/cifar-100"}]},
    }
    OmegaConf.save(OmegaConf.create(config), run / "config.yaml")
    scores = {"kind": "classification", "n": 10, "exact": 0.5, "top5": 0.9, "nll": 1.0, "ece": 0.0123}
    scores["interval"] = [0.23659, 0.76341]
    (run / "evaluation" / "test" / "student").mkdir(parents=True)
    (run / "evaluation" / "test" / "student" / "scores.json").write_text(json.dumps(scores))
    assert main([str(run), str(out), "--license", "mit", "--hub", "me/student"]) == 0
    assert str(out) in capsys.readouterr().out
    facts, text = front_matter(out)
    assert facts["library_name"] == "timm"
    assert facts["base_model"] == "timm/resnet34.tv_in1k"
    top1, top5, error = ModelCard.load(out / "README.md").data.eval_results
    assert (top1.metric_value, top1.metric_args) == (0.5, {"n": 10, "interval_95": [0.2366, 0.7634]})
    assert (top5.metric_name, top5.metric_value, error.metric_value) == ("top-5", 0.9, 0.0123)
    assert facts["license"] == "mit"
    assert "| cross_entropy | 0.1 | by default label_smoothing 0.0 |" in text
    assert "| kd | 0.9 | temperature 4 |" in text
    assert "| test | top-1 | 50.00% | 23.66% to 76.34% | 10 |" in text
    assert "| somewhere/cifar-100 | somewhere/cifar-100 | 1 |" in text
    assert "hf download me/student" in text
    assert "python -m vision.evaluate path/to/this/folder" in text
    assert "mean 0.5071, 0.4867, 0.4408" in text
    assert "import vision.cifar" in text


def test_onnx_takes_pixels_and_gives_torchs_logits(student, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    difference = export(student, tmp_path, About("tiny"), onnx=True)
    assert 0 <= difference < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    pixels = torch.rand(5, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (student.inputs.mean, student.inputs.std))
    found = torch.from_numpy(session.run(["logits"], {"images": pixels.numpy()})[0])
    torch.testing.assert_close(found, student((pixels - mean) / std).logits.detach(), atol=1e-4, rtol=1e-4)
    assert f"{difference:.1e}" in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob("*.data"))
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()  # source files of the exporter's stack traces


def test_mistakes(student, tmp_path, capsys):
    with pytest.raises(UserError, match="neither a run with a finished student nor"):
        export_run(tmp_path, tmp_path / "out")
    student.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="choose another folder"):
        export_run(tmp_path, tmp_path)
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2


def test_an_export_goes_into_a_folder(student, tmp_path, capsys):
    student.save_pretrained(tmp_path / "student")
    (tmp_path / "file").write_text("mine")
    assert main([str(tmp_path / "student"), str(tmp_path / "file")]) == 2
    assert "file: is a file; an export is a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
