"""A model of this suite inside other harnesses: lmms-eval for real where it is installed, VLMEvalKit's interface."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import tiny
from PIL import Image

from vlm_distill import models
from vlm_distill.evaluation.adapters import vlmevalkit
from vlm_distill.evaluation.adapters.harness_prompts import answers, prompt

TASK = """
task: colours
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3, until: ["."]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_teacher(folder)
    return folder


def test_answers_come_in_the_order_of_the_prompts(folder):
    model = models.load_vlm(folder)
    asked = [prompt([Image.new("RGB", (16, 16), colour), "what color is it?"]) for colour in ("red", "blue", "black")]
    asked += [prompt(["say yes"]), prompt([Image.new("RGBA", (16, 16)), "is it?", Image.new("L", (9, 9))])]
    together = answers(model, asked, batch_size=2, max_new_tokens=3)
    alone = [model.generate([one], max_new_tokens=3)[0].text for one in asked]
    assert together == alone


def test_vlmevalkit_finds_the_model_in_its_list(folder, tmp_path, monkeypatch):
    # A stand-in with the two names that are used: the package itself is on no index.
    base = ModuleType("vlmeval.vlm.base")
    asked = {"generate": lambda self, message, dataset: self.generate_inner(message, dataset)}
    base.BaseModel = type("BaseModel", (), asked)
    config = ModuleType("vlmeval.config")
    config.supported_VLM = {}
    for name, module in {"vlmeval": ModuleType("vlmeval"), "vlmeval.vlm": ModuleType("vlmeval.vlm")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", base)
    monkeypatch.setitem(sys.modules, "vlmeval.config", config)
    vlmevalkit.register("tiny", str(folder), max_new_tokens=3)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    message = [{"type": "image", "value": str(tmp_path / "red.png")}, {"type": "text", "value": "what color is it?"}]
    found = config.supported_VLM["tiny"]().generate(message, dataset="POPE")
    asked = [prompt([Image.new("RGB", (16, 16), "red"), "what color is it?"])]
    assert found == models.load_vlm(folder).generate(asked, max_new_tokens=3)[0].text


@pytest.mark.parametrize(
    ("dataset", "length"), [("POPE", 128), ("TextVQA_VAL", 16), ("MME", 16), ("X", 512), (None, 512)]
)
def test_answers_in_vlmevalkit_are_as_long_as_in_our_own_evaluation(dataset, length):
    assert vlmevalkit.answer_length(dataset) == length


def test_lmms_eval_asks_the_model(folder, tmp_path):
    pytest.importorskip("lmms_eval")
    rows = [
        {"question": "what color is it?", "image": Image.new("RGB", (16, 16), c), "answer": c} for c in tiny.COLOURS
    ]
    path = tmp_path / "colours.parquet"
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(path)
    (tmp_path / "colours.yaml").write_text(TASK.format(data=path))
    (tmp_path / "utils.py").write_text("def visual(doc):\n    return [doc['image'].convert('RGB')]\n")
    command = [sys.executable, "-m", "lmms_eval", "--model", "vlm_distill", "--model_args", f"pretrained={folder}"]
    command += ["--include_path", str(tmp_path), "--tasks", "colours", "--batch_size", "3", "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (tmp_path / "out").rglob("*_samples_colours.jsonl")
    said = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, log.read_text().splitlines())}
    model = models.load_vlm(folder)
    for i, row in enumerate(rows):
        wanted = model.generate([prompt([row["image"], row["question"]])], max_new_tokens=3)[0].text.split(".")[0]
        assert said[i] == wanted
