"""Small configurations of both paths, written as files; none of what they name exists."""

from pathlib import Path
from typing import get_args

import yaml

from vlm_distill.config.fields import Section

GOOD = {
    "student": {"path": "student"},
    "teacher": {"path": "teacher"},
    "loss": [{"name": "taid", "t_start": 0.2}],
    "data": {"train": [{"path": "train.jsonl"}]},
    "training": {"steps": 10, "batch_size": 64},
    "output": "runs/x",
}
CLASSIFIER = {
    "student": {"name": "resnet18"},
    "teacher": {"name": "resnet34", "pretrained": True},
    "loss": [{"name": "kd"}],
    "data": {"train": [{"path": "train"}]},
    "training": {"epochs": 2, "batch_size": 64},
    "output": "runs/x",
}


def write(folder, changes=None, drop=(), *, good=GOOD, name="run.yaml") -> Path:
    """A good configuration with sections changed or dropped, as a file."""
    plain = {k: v for k, v in good.items() if k not in drop} | (changes or {})
    path = folder / name
    path.write_text(yaml.safe_dump(plain))
    return path


def sections_in(section):
    """Return a section's class and those of all sections in it."""
    found, waiting = set(), [section]
    while waiting:
        part = waiting.pop()
        if isinstance(part, type) and issubclass(part, Section):
            if part not in found:
                found.add(part)
                waiting += [field.annotation for field in part.model_fields.values()]
        else:
            waiting += get_args(part)
    return found
