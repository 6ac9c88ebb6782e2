"""Recipes of who teaches: each takes two steps with its own settings, on a tiny Qwen2.5-VL and tiny data."""

import json
import math
from pathlib import Path

import families
import pytest
import tiny
from byte_tokenizer import make_tokenizer
from PIL import Image

from vlm_distill.caching.fill import fill
from vlm_distill.config.file import load_config
from vlm_distill.models.lora import WithoutAdapters
from vlm_distill.trainer import Trainer

CONFIGS = Path("configs/vlm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    tiny.write_data(folder / "data", rows=12, size=(84, 56))
    for path in (folder / "data").glob("*.png"):
        Image.effect_noise((84, 56), 90).convert("RGB").save(path)  # so that a blur changes something
    maker = families.Maker(make_tokenizer)
    for seed, name in enumerate(("student", "teacher", "charts")):
        maker.write("qwen2_5_vl", folder / name, seed=seed)
    return folder


def shrunk(folder, recipe, *more):
    """The recipe with the tiny models, data and sizes; everything else is its own."""
    data = folder / "data" / "data.jsonl"
    return load_config(
        CONFIGS / f"{recipe}.yaml",
        [
            f"student.path={folder / 'student'}",
            f"data.train.0={{path: {data}, name: one}}",
            *("data.max_length=512", "data.workers=0"),
            *("training.steps=2", "training.batch_size=4", "training.micro_batch_size=2", "training.device=cpu"),
            f"output={folder / recipe}",
            *more,
        ],
    )


def lines(run):
    found = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def trained(config, processes):
    run = Trainer(config, processes)
    run.run()
    found = lines(run)
    assert len(found) == 2
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in found)
    return run, found


def test_a_moving_average_that_sees_the_answer(folder, processes):
    run, found = trained(shrunk(folder, "self_distillation"), processes)
    assert run.teacher.ema == 0.999
    # The answers in the question make the copy another teacher than the student is to itself.
    assert all(line["forward_kl/loss"] > 0 for line in found)


def test_own_answers_judged_by_a_base_that_sees_answer_and_full_images(folder, processes):
    smaller = "student.image={max_pixels: 784}", "on_policy.max_new_tokens=4"
    run, found = trained(shrunk(folder, "privileged_on_policy", *smaller), processes)
    assert all(line["on_policy/step"] == 1 and line["reverse_kl/loss"] > 0 for line in found)
    assert isinstance(run.teacher.model, WithoutAdapters)
    student, teacher = run.student.processor, run.teacher.processor
    picture = Image.new("RGB", (200, 200))
    assert len(student.image_row([picture]).input_ids) < len(teacher.image_row([picture]).input_ids)


def test_own_answers_weighed_by_what_their_images_tell(folder, processes):
    own = f"teacher.path={folder / 'teacher'}", "on_policy.max_new_tokens=4"
    _, found = trained(shrunk(folder, "visual_advantage", *own), processes)
    assert all(line["on_policy/visual_advantage"] != 0 for line in found)


def test_two_teachers_one_of_them_cached(folder, processes):
    paths = {"general": "teacher", "charts": "charts"}
    config = shrunk(
        folder,
        "two_teachers",
        *(f"teachers.{name}.path={folder / path}" for name, path in paths.items()),
        f"teachers.charts.cache.folder={folder / 'cache'}",
        "teachers.general.placement=replicate",
        "data.train.0.teacher=general",
        f"data.train.1.path={folder / 'data' / 'data.jsonl'}",
        *("data.train.1.config=null", "data.train.1.split=null"),
    )
    fill(config, processes)
    _, found = trained(config, processes)
    shares = [line["teacher/general/share"] + line["teacher/general+charts/share"] for line in found]
    assert shares == pytest.approx([1, 1])
