"""A synthetic run folder, as training and evaluation leave it."""

import json
import math
import random

import pytest
from PIL import Image

from vlm_distill.evaluation.predictions import Prediction
from vlm_distill.evaluation.source_scores import write_answers

CONFIG = """\
student:
  from_teacher: {{layers: 1}}
teacher:
  path: teachers/easy-vqa
loss:
{terms}
optimizer:
  lr: 0.002
training:
  steps: {steps}
  seed: 0
output: runs/{name}
"""


def predict(questions, accuracy, rng, wrong=("yes", "no", "teal", "circle")):
    """Answers of a made-up model that is right with the given probability."""
    predictions = []
    for i, (question, answer, image, kind) in enumerate(questions):
        right = rng.random() < accuracy
        said = answer if right else rng.choice([w for w in wrong if w != answer])
        score = float(said == answer)
        sure = rng.uniform(0.75, 1) if right else rng.uniform(0.35, 0.8)
        predictions.append(Prediction(i, "test", i + 1, question, [answer], said, sure, score, score, kind, image))
    return predictions


def build_run(
    folder, questions, *, taid=True, accuracy=0.85, teacher=0.99, teachers=None, steps=60, seed=0, evaluations=6
):
    """Writes a run folder; ``teacher=None`` trains without one, ``teachers`` are several by name."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    terms = "  taid: {weight: 1.0, t_start: 0.4}\n  cross_entropy: {weight: 0.1}" if taid else "  cross_entropy: {}"
    (folder / "config.yaml").write_text(CONFIG.format(terms=terms, steps=steps, name=folder.name))
    lines = []
    every = max(1, steps // max(1, evaluations))
    for step in range(1, steps + 1):
        part = step / steps
        entropy = 0.25 + 0.9 * math.exp(-5 * part) + rng.gauss(0, 0.05)
        line = {"kind": "train", "step": step, "cross_entropy/loss": entropy, "lr": 0.002 * (1 - part**2)}
        if taid:
            line |= {"taid/loss": 0.12 * math.exp(-2 * part) + rng.gauss(0, 0.01), "taid/t": 0.4 + 0.6 * part}
        line["loss"] = line.get("taid/loss", 0) + (0.1 if taid else 1) * entropy
        line |= {"grad_norm": 1 + rng.random(), "tokens_per_second": 9000 + 500 * rng.random(), "samples": step * 64}
        line["seconds"] = step * 0.11
        lines.append(line)
        if evaluations and step % every == 0:
            exact = accuracy - (accuracy - 0.5) * math.exp(-4 * part)
            lines.append(
                {"kind": "eval", "step": step, "data": "test", "exact": exact, "soft": exact, "n": len(questions)}
                | {"seconds": step * 0.11}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "command": f"vlm-distill train configs/demo/{folder.name}.yaml --nproc 2",
        "started": "2026-11-24 10:00",
        "finished": "2026-11-24 10:02",
        "seconds": steps * 0.11,
        "steps": steps,
        "device": "CPU, 2 cores",
        "ranks": 2,
        "versions": {"torch": "2.14.1", "transformers": "5.23.0", "deepspeed": "0.19.8"},
        "parameters": {"student": 75_312, "teacher": 1_512_448 if teacher else None, "trained": 75_312},
        "memory": {"peak_bytes": 812 * 2**20},
        "problems": {"train: image not found": 3} if taid else {},
        "answers_per_second": {"test": {"student": 581.2, **({"teacher": 96.4} if teacher else {})}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    if evaluations:
        write_answers(folder / "evaluation" / "test" / "student", predict(questions, accuracy, rng))
        if teacher:
            write_answers(folder / "evaluation" / "test" / "teacher", predict(questions, teacher, random.Random(99)))
        for name, right in (teachers or {}).items():
            answers = predict(questions, right, random.Random(98))
            write_answers(folder / "evaluation" / "test" / f"teacher_{name}", answers)
    return folder


@pytest.fixture
def questions(tmp_path):
    """Forty questions about ten pictures: (question, answer, picture, question type)."""
    colours = {"red": (220, 40, 40), "teal": (0, 128, 128)}
    rows = []
    for i in range(10):
        name = list(colours)[i % 2]
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (16, 16), colours[name]).save(path)
        rows += [
            ("What colour is it?", name, str(path), "colour"),
            ("Is it red?", "yes" if name == "red" else "no", str(path), "yes/no"),
            ("Is it teal?", "yes" if name == "teal" else "no", str(path), "yes/no"),
            ("What shape is it?", "circle", str(path), "shape"),
        ]
    return rows


@pytest.fixture
def make_run(tmp_path, questions):
    def make(name="taid", **options):
        return build_run(tmp_path / "runs" / name, questions, **options)

    return make
