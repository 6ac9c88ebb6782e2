"""The same step gives the same loss and the same weights however it is split, under every ZeRO stage.

One rank and two ranks run ``scenarios.py``, each in one launch; the tests compare what they wrote.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scenarios

from vlm_distill.launch import free_port

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenarios")
    # The checkout's own packages, wherever an editable install points.
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "support"), str(HERE.parents[1])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    script = str(HERE / "scenarios.py")
    # Not a fixed one, which another run on this machine may hold.
    port = str(free_port())
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    for command in ([sys.executable, script], [*launcher, script]):
        done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]

    def read(world, name):
        return json.loads((folder / f"ranks{world}" / f"{name}.json").read_text())

    return read


def losses(result):
    return [line["loss"] for line in result["metrics"] if line["kind"] == "train"]


def same_weights(a, b, tolerance):
    assert a["weights"].keys() == b["weights"].keys()
    for name, values in a["weights"].items():
        if name.endswith("k_proj.bias"):
            continue  # softmax ignores a key's bias: its gradient is rounding alone, which AdamW makes a step of
        assert b["weights"][name] == pytest.approx(values, abs=tolerance), name


@pytest.mark.parametrize("name", sorted(scenarios.SHARED))
def test_two_ranks_equal_one(results, name):
    one, two = results(1, name), results(2, name)
    # CTKD's loss is a small KL times T², and float32's rounding with it.
    assert losses(two) == pytest.approx(losses(one), rel=1e-4 if name.startswith("ctkd") else 1e-5)
    same_weights(one, two, 1e-5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "name", sorted(n for n in scenarios.SHARED if n[-1] != "0" and f"{n[:-1]}0" in scenarios.SHARED)
)
def test_every_zero_stage_equals_none(results, world, name):
    same_weights(results(world, f"{name[:-1]}0"), results(world, name), 1e-5)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("shard_zero2", "zero2"),
        ("shard_zero3", "zero2"),
        ("llava_shard_zero3", "llava_zero3"),
        ("language_shard_zero2", "language_zero0"),
        ("uld_shard_zero3", "uld_zero2"),
    ],
)
def test_sharded_teacher_equals_replicated(results, name, whole):
    same_weights(results(2, whole), results(2, name), 1e-5)


@pytest.mark.parametrize("name", scenarios.RESUMED)
def test_resumed_equals_uninterrupted(results, name):
    def story(result):
        times = ("seconds", "tokens_per_second")
        return [{k: v for k, v in line.items() if k not in times} for line in result["metrics"]]

    straight, resumed = results(2, name), results(2, f"resumed_{name}")
    assert story(resumed) == story(straight)
    assert resumed["weights"] == straight["weights"]


def test_dropout_drops(results):
    assert losses(results(2, "dropout_zero2")) != losses(results(2, "zero2"))


def test_ranks_agree_on_running_statistics(results):
    first, second = results(2, "batchnorm_zero2")["statistics"]
    assert first
    assert first == second


def test_activation_checkpointing_changes_nothing(results):
    same_weights(results(1, "zero2"), results(1, "checkpointing_zero2"), 1e-6)


@pytest.mark.parametrize("name", ["zero0", "mixed_zero3", "bf16_zero2"])
def test_t_is_the_same_on_every_rank(results, name):
    first, second = results(2, name)["t"]
    assert first == second
    assert first[0] > 0.4


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bfloat16_follows_float32(results, stage):
    assert losses(results(2, f"bf16_zero{stage}")) == pytest.approx(losses(results(2, "zero0")), rel=5e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_losss_own_parameter_learns_alike(results, stage):
    def temperatures(world):
        return [t["ctkd/temperature"] for t in results(world, f"ctkd_zero{stage}")["metrics"] if t["kind"] == "train"]

    assert temperatures(2) == pytest.approx(temperatures(1), rel=1e-6)
    assert abs(temperatures(2)[-1] - temperatures(2)[0]) > 1e-3


def test_frozen_parts_stay_and_others_move(results):
    moved = results(2, "frozen_zero2")["moved"]
    assert not any(changed for name, changed in moved.items() if name.startswith("vision_encoder."))
    assert all(changed for name, changed in moved.items() if not name.startswith("vision_encoder."))


def test_every_part_trains_by_default(results):
    assert all(results(2, "zero3")["moved"].values())


def test_micro_batches_without_pictures_or_samples(results):
    # 5 of 24 rows are broken, so that a step is smaller and, with two rows a micro-batch, some hold nothing.
    samples = [line["samples"] for line in results(2, "mixed_zero3")["metrics"] if line["kind"] == "train"]
    assert sum(samples[:3]) == 19
    assert all(results(2, "mixed_zero3")["moved"].values())


def test_the_teacher_is_in_no_checkpoint(results):
    for name in ("zero2", "shard_zero3"):
        assert results(2, name)["teacher_keys"] == []


@pytest.mark.parametrize(
    ("name", "questions"), [("eval_zero3", 13), ("eval_frozen_zero3", 13), ("shard_mixed_zero3", 9)]
)
def test_answers_under_zero3(results, name, questions):
    lines = [line for line in results(2, name)["metrics"] if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == ([2, 4, 5] if name == "eval_frozen_zero3" else [5])
    assert all(line["n"] == questions for line in lines)
