"""A classifier's training that is killed goes on as the shared loop does, with its average of the weights."""

import json

import pictures
import pytest
import tiny
import yaml
from forks import Forks

STEPS = 6
RUN = "vision.train"


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


def test_killed_and_told_to_stop_equals_uninterrupted(tmp_path, forks):
    images = pictures.make_images(tmp_path / "images", broken=(5,))
    held_out = [{"path": str(images), "name": "held_out"}]
    changes = {
        "training__steps": STEPS,
        "training__checkpoint_every": 2,
        "training__ema": 0.9,
        "data__eval": held_out,
        "evaluation": {"every_epochs": 1, "best": "held_out", "batch_size": 16},
    }

    def config(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(pictures.config(tmp_path / name, images, None, **changes)))
        return path

    codes, told = forks(RUN, config("straight"))
    assert codes == [0], told
    killed = config("killed")
    for fault in ("log:3", "checkpoint.file:1", "student:1"):
        codes, told = forks(RUN, killed, fault=fault)
        assert codes == [-9], (fault, told)
    codes, told = forks(RUN, killed)
    assert codes == [0], told
    assert "resumed after step" in told

    def story(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in tiny.TIMES} for line in lines]

    assert story("killed") == story("straight")
    assert [line["step"] for line in story("killed") if line["kind"] == "train"] == list(range(1, STEPS + 1))
    for model in ("student", "best"):
        files = [next((tmp_path / name / model).glob("*.safetensors")).read_bytes() for name in ("killed", "straight")]
        assert files[0] == files[1], model
