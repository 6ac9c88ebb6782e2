"""The same step gives the same loss and weights however it is split, under every ZeRO stage, and after a resume.

One rank and two ranks run ``runs.py``, each in one launch; the tests compare what they wrote.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import launches
import pytest
import tiny
from by_path import load

HERE = Path(__file__).parent
runs = load(HERE / "runs.py")


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    done = {}

    def launch(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp("classifiers") / kind
            folder.mkdir()
            done[kind] = launches.on_one_rank_and_two(HERE / "runs.py", folder)
        return done[kind]

    return launch


@pytest.fixture
def results(launched, request):
    """What a run wrote, by the number of ranks and its name."""

    def read(world, name):
        # Both kinds for a slow test; one fast test that read a slow run would have all of them run.
        slow = runs.slow(world, name)
        assert not slow or request.node.get_closest_marker("slow"), f"mark this test as slow, as {name} is"
        return launched("slow" if slow else "fast")(world, name)

    return read


def marked(tests, reads):
    return launches.marked(tests, reads, runs.slow)


def without_zero(name):
    return launches.without_zero(name, runs.SHARED)


def losses(result):
    return [line["loss"] for line in result["metrics"] if line["kind"] == "train"]


def same_weights(a, b, tolerance):
    assert a["weights"].keys() == b["weights"].keys()
    for name, values in a["weights"].items():
        if name.endswith("qkv.bias"):
            continue  # softmax ignores a key's bias: its gradient is rounding alone, which AdamW makes a step of
        assert b["weights"][name] == pytest.approx(values, abs=tolerance), name


@pytest.mark.parametrize("name", marked(sorted(runs.SHARED), lambda name: [(1, without_zero(name)), (2, name)]))
def test_two_ranks_equal_one(results, name):
    one, two = results(1, without_zero(name)), results(2, name)
    # CTKD's loss is a small KL times T², and float32's rounding with it.
    assert losses(two) == pytest.approx(losses(one), rel=1e-3 if name.startswith("ctkd") else 1e-4)
    # DIST compares columns of few numbers, whose spread may be near its guard against zero.
    same_weights(one, two, 1e-4 if name.startswith("broken_gathered") else 1e-5)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-3)
    assert any(one["moved"].values())


@pytest.mark.parametrize(
    ("world", "name"),
    marked(
        product((1, 2), sorted(name for name in runs.SHARED if without_zero(name) != name)),
        lambda world, name: [(world, name), (world, without_zero(name))],
    ),
)
def test_every_zero_stage_equals_none(results, world, name):
    same_weights(results(world, without_zero(name)), results(world, name), 1e-5)


@pytest.mark.slow
def test_layer_decay_is_heeded_under_zero(results):
    assert losses(results(2, "layer_decay_zero2")) != losses(results(2, "adamw_zero2"))


@pytest.mark.parametrize("name", marked(runs.RESUMED, lambda name: [(2, name), (2, f"resumed_{name}")]))
def test_resumed_equals_uninterrupted(results, name):
    def story(result):
        return [{k: v for k, v in line.items() if k not in tiny.TIMES} for line in result["metrics"]]

    straight, resumed = results(2, name), results(2, f"resumed_{name}")
    assert story(resumed) == story(straight)
    assert resumed["weights"] == straight["weights"]
    assert resumed["exported"] == straight["exported"]


@pytest.mark.parametrize("name", ["batchnorm_zero2", "averaged_batchnorm_zero0"])
def test_ranks_agree_on_running_statistics(results, name):
    first, second = results(2, name)["statistics"]
    assert first
    assert first == second


def test_activation_checkpointing_changes_nothing(results):
    same_weights(results(1, "zero0"), results(1, "checkpointing_zero0"), 1e-6)


def test_channels_last_changes_nothing_but_rounding(results):
    plain, other = results(2, "averaged_batchnorm_zero0"), results(2, "channels_last_zero0")
    assert losses(other) == pytest.approx(losses(plain), rel=1e-3)


@pytest.mark.parametrize("world", [1, 2])
def test_a_remembered_teacher_teaches_the_same(results, world):
    """Two fixed views of 60 images in four steps an epoch: from the third epoch on, step 8, the teacher rests."""
    asked, remembered = results(world, "views_zero0"), results(world, "cached_zero0")
    assert losses(remembered) == losses(asked)
    assert remembered["weights"] == asked["weights"]
    # One more at the beginning, which looks whether the teacher is any good; and in the third epoch again one for the
    # micro-batch that has no images, as 60 are 3 and 3/4 steps of 16.
    assert sum(asked["asked"]) == 12 * 4 + 1
    assert sum(remembered["asked"]) == 8 * 4 + 1 + 1


def test_broken_images_are_counted_and_cost_nothing(results):
    for name in ("broken_zero0", "broken_gathered_zero0"):
        for world in (1, 2):
            result = results(world, name)
            assert result["problems"] == {"images: not an image": 40}
            assert all(value == value for value in losses(result))


def test_a_probe_moves_the_head_alone(results):
    moved = results(1, "probe_zero0")["moved"]
    assert {name for name, changed in moved.items() if changed} == {"model.head.weight", "model.head.bias"}


def test_the_average_is_what_is_exported(results):
    result = results(2, "averaged_zero2")
    name = "model.head.weight"
    assert result["exported"]["head.weight"] != result["weights"][name]
    assert result["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("stage", marked(range(4), lambda stage: [(2, f"bf16_zero{stage}")]))
def test_bf16_stays_near_float32(results, stage):
    assert losses(results(2, f"bf16_zero{stage}")) == pytest.approx(losses(results(2, "zero0")), rel=0.05)
    assert losses(results(2, f"bf16_zero{stage}")) != losses(results(2, "zero0"))


def test_dkd_warms_up(results):
    lines = [line for line in results(1, "mixed_zero0")["metrics"] if line["kind"] == "train"]
    # Four steps an epoch, two epochs of warm-up.
    for line, factor in ((lines[0], 0.5), (lines[4], 1.0)):
        assert line["loss"] == pytest.approx(factor * line["dkd/loss"] + line["cross_entropy/loss"], rel=1e-5)


def test_no_teacher_is_in_a_checkpoint(results):
    assert results(1, "zero0")["teacher_keys"] == []


@pytest.mark.parametrize("loss", ["kd", pytest.param("dkd", marks=pytest.mark.slow)])
def test_steps_equal_a_plain_loop(tmp_path, loss):
    """Five steps of SGD of a CIFAR network, from the same weights and batches, against plain PyTorch."""
    terms = {"kd": [{"name": "kd", "temperature": 4, "weight": 0.9}], "dkd": [{"name": "dkd", "beta": 2.0}]}[loss]
    done = plain_loop(tmp_path, [*terms, {"name": "cross_entropy", "weight": 0.1}])
    assert done.returncode == 0, done.stderr[-3000:]


def plain_loop(folder, terms):
    """In a process of its own: DeepSpeed's is one training's."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [HERE.parents[1], HERE.parent / "support"]))}
    command = [sys.executable, str(HERE / "plain_loop.py"), str(folder), json.dumps(terms)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
