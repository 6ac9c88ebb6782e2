"""A run's micro-batches are the same, whether samples are encoded together and once, or alone for each model."""

import json

import pytest
import tiny
from batches import same
from scoring_server import serving

from data import loader
from vlm_distill import run as module
from vlm_distill.caching.fill import fill
from vlm_distill.config.sections import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.run import Run
from vlm_distill.trainer import Trainer

FROZEN = {"from_teacher": {"layers": 2}, "train": ["projector", "decoder"]}
LARGER = {**tiny.settings(), "vision_encoder": {**tiny.settings()["vision_encoder"], "image_size": 24}}
OTHER_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared_encoding")
    # Micro-batches with two images, one and none, and with bad samples.
    tiny.write_data(folder / "data", text_only=(0, 1, 2, 8, 9, 15), broken=(4, 5, 20))
    tiny.write_data(folder / "text", text_only=tuple(range(24)))
    tiny.write_teacher(folder / "teacher")
    tiny.write_language_model(folder / "reader")
    return folder


def settings(folder, name, data="data", teacher="teacher", **changes):
    plain = tiny.config(folder / name, folder / data / "data.jsonl", folder / teacher, **changes)
    return RunConfig.model_validate(plain)


def made(monkeypatch, make):
    """What ``make(shared)`` returns with everything shared, and with nothing."""
    shared = make("shared")
    with monkeypatch.context() as patch:
        patch.setattr(module, "share_processing", lambda *both: both)
        patch.setattr(loader, "_PIXELS_TOGETHER", -1)
        return shared, make("apart")


def steps(config, processes):
    run = Run(config, processes)
    run.prepare()
    return [run.dataset[number] for number in range(3)]


CASES = {
    "own": {},
    "packed": {"data__packing": True},
    "shared vision": {"student": FROZEN},
    "other template": {"teacher__chat_template": OTHER_TEMPLATE},
    "other images": {"student": LARGER},
    "view": {"teacher__view": {"system": "say it", "images": {"blur": 1}}},
    "hidden": {"teacher__cache": {"form": "hidden"}},
    "topk": {"teacher__cache": {"form": "topk", "k": 4}, "loss": [{"name": "forward_kl"}]},
}


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_are_those_of_samples_encoded_alone(name, folder, processes, monkeypatch):
    changes = dict(CASES[name])
    if cache := changes.get("teacher__cache"):
        changes["teacher__cache"] = {**cache, "folder": str(folder / name)}
        fill(settings(folder, "filled", **changes), processes)
    shared, apart = made(monkeypatch, lambda kind: steps(settings(folder, f"{name} {kind}", **changes), processes))
    for one, other in zip(shared, apart, strict=True):
        assert one.problems == other.problems
        for mine, theirs in zip(one.batches, other.batches, strict=True):
            same(mine, theirs)
    assert sum(len(step.problems) for step in shared) == 3


def test_a_served_teacher_is_asked_for_the_same_tokens(folder, processes, monkeypatch):
    with serving(load_vlm(folder / "reader", dtype="float32").eval()) as server:
        changes = {"student": {"decoder": tiny.settings()["decoder"], "tokenizer": "teacher"}}
        changes["teacher__server"] = {"url": server.url, "model": "teacher-1", "top_logprobs": 5}
        shared, apart = made(
            monkeypatch, lambda kind: steps(settings(folder, f"served {kind}", "text", "reader", **changes), processes)
        )
    for one, other in zip(shared, apart, strict=True):
        for mine, theirs in zip(one.batches, other.batches, strict=True):
            same(mine, theirs)


def test_drawn_answers_teach_the_same(folder, processes, monkeypatch):
    def losses(kind):
        own = {"fraction": 1.0, "max_new_tokens": 4}
        config = settings(folder, f"drawn {kind}", on_policy=own, loss=[{"name": "forward_kl"}], training__steps=2)
        lines = [json.loads(line) for line in (Trainer(config, processes).run() / "metrics.jsonl").open()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    shared, apart = made(monkeypatch, losses)
    assert shared == apart
    assert len(shared) == 2
