"""Synthetic runs of classifiers, as training and evaluation leave them."""

import hashlib
import json
import zlib
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from vision.metrics import measure, summarise
from vlm_distill.evaluation.pictures import write_pictures
from vlm_distill.evaluation.predictions import Prediction, write_predictions

CONFIG = """\
student: {{name: resnet8x4}}
teacher: {{name: resnet32x4}}
loss: {{{loss}: {{}}}}
training: {{seed: {seed}, steps: 40}}
"""


def picture(label, row, classes):
    """28 by 28: a bar at the label's place and noise."""
    pixels = np.random.default_rng(row).integers(0, 90, (28, 28), dtype=np.uint8)
    pixels[:, 28 * label // classes : 28 * (label + 1) // classes + 2] += 140
    return Image.fromarray(pixels).convert("RGB")


def answers(skill, classes, n, seed, teacher=None):
    """Labels, logits and their measures; ``skill`` is the right class's lead."""
    labels = np.arange(n) * 7 % classes
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(0).normal(size=(n, classes))  # what is hard is hard for all
    logits = 1.2 * shared + rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += skill
    logits = torch.from_numpy(logits)
    right = torch.nn.functional.one_hot(torch.from_numpy(labels), classes).bool()
    pair = None if teacher is None else (logits, teacher)
    return labels, logits, measure(range(n), labels, logits, right, pair)


def write_evaluation(folder, names, skill, n, seed, teacher=None, data="test"):
    """Scores and predictions; returns the logits."""
    labels, logits, found = answers(skill, len(names), n, seed, teacher)
    folder.mkdir(parents=True)
    scores = summarise(found, names) | {"skipped": {"image is broken": 2}}
    (folder / "scores.json").write_text(json.dumps(scores))
    made = {row: picture(labels[row], row, len(names)) for row in range(n)}
    predictions = [
        Prediction(
            index=row,
            source=data,
            line=row + 1,
            question="",
            references=[names[labels[row]]],
            answer=names[found.answers[row]],
            probability=float(found.confidence[row]),
            exact=float(found.right[row]),
            soft=float(found.right[row]),
            image=f"sha256:{hashlib.sha256(made[row].tobytes()).hexdigest()[:32]}",
        )
        for row in range(n)
    ]
    write_predictions(folder / "predictions.jsonl", predictions)
    wrong = [p for p in predictions if not p.exact][:60] + [p for p in predictions if p.exact][:20]
    write_pictures(folder.parent / "pictures", [replace(p) for p in wrong], made.__getitem__, lambda image: image)
    return logits


def build_classifier(folder, skill=2.0, *, names=None, n=400, seed=0, loss="kd", teacher=True, data="test"):
    """Writes a run folder of a classifier."""
    names = names or ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(loss=loss, seed=seed))
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, 41):
        line = {"kind": "train", "step": step, "loss": 2.3 / step**0.4 + 0.05 * rng.normal(), "lr": 0.05}
        line |= {"images_per_second": 1500 + 20 * rng.normal(), "waiting": 0.03, "seconds": step * 0.4}
        lines.append(line)
        if step % 10 == 0:
            exact = 0.8 - 0.5 / step**0.5
            scores = {"exact": exact, "top5": 0.5 + exact / 2, "n": n}
            lines.append({"kind": "eval", "step": step, "data": data, **scores, "seconds": step * 0.4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "command": f"vlm-distill classify configs/cifar100/{loss}.yaml",
        "started": "2026-11-24 10:00",
        "seconds": 16.0,
        "steps": 40,
        "device": "CPU, 2 cores",
        "ranks": 1,
        "parameters": {"student": 1_233_540, "teacher": 7_433_860, "trained": 1_233_540},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    logits = None
    if teacher:
        logits = write_evaluation(folder / "evaluation" / data / "teacher", names, 4.0, n, 99, data=data)
    student = 1 + seed + 1000 * zlib.crc32(loss.encode())
    write_evaluation(folder / "evaluation" / data / "student", names, skill, n, student, logits, data)
    return folder
