"""The same step gives the same loss and the same weights however it is split, under every ZeRO stage.

One rank and two ranks run ``scenarios.py``, each in one launch, and in another one what is slow; the tests compare what
they wrote.
"""

from itertools import product
from pathlib import Path

import launches
import pytest
import scenarios
import tiny


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    done = {}

    def launch(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp("scenarios") / kind
            done[kind] = launches.on_one_rank_and_two(Path(scenarios.__file__), folder)
        return done[kind]

    return launch


@pytest.fixture
def results(launched, request):
    """What a scenario wrote, by the number of ranks and its name."""

    def read(world, name):
        slow = scenarios.slow(world, name)
        # One fast test that reads a slow scenario would have all of them run.
        assert not slow or request.node.get_closest_marker("slow"), f"mark this test as slow, as {name} is"
        return launched("slow" if slow else "fast")(world, name)

    return read


def marked(tests, reads):
    return launches.marked(tests, reads, scenarios.slow)


def on_two(*names):
    return [(2, name) for name in names]


def without_zero(name):
    return launches.without_zero(name, scenarios.SHARED)


def steps(result):
    return [line for line in result["metrics"] if line["kind"] == "train"]


def losses(result):
    return [line["loss"] for line in steps(result)]


def same_weights(a, b, tolerance):
    assert a["weights"].keys() == b["weights"].keys()
    for name, values in a["weights"].items():
        if name.endswith("k_proj.bias"):
            continue  # softmax ignores a key's bias: its gradient is rounding alone, which AdamW makes a step of
        assert b["weights"][name] == pytest.approx(values, abs=tolerance), name


def same_training(one, other, name):
    # CTKD's loss is a small KL times T², and float32's rounding with it.
    assert losses(other) == pytest.approx(losses(one), rel=1e-4 if name.startswith("ctkd") else 1e-5)
    # Muon's orthogonalisation magnifies rounding where a gradient is small in some direction.
    same_weights(one, other, 1e-3 if name.startswith("muon") else 1e-5)
    # Evaluation reads a sharded head as training does.
    assert other["held_out"] == pytest.approx(one["held_out"], rel=1e-3)


@pytest.mark.parametrize("name", marked(sorted(scenarios.SHARED), lambda name: [(2, name), (1, without_zero(name))]))
def test_two_ranks_under_any_zero_stage_equal_one_without(results, name):
    same_training(results(1, without_zero(name)), results(2, name), name)


@pytest.mark.parametrize(
    "name",
    marked(
        sorted(name for name in scenarios.SHARED if without_zero(name) != name),
        lambda name: [(1, name), (1, without_zero(name))],
    ),
)
def test_one_rank_under_any_zero_stage_equals_one_without(results, name):
    same_training(results(1, without_zero(name)), results(1, name), name)


@pytest.mark.parametrize(
    ("name", "whole"),
    marked(
        [
            ("shard_zero2", "zero2"),
            ("shard_zero3", "zero2"),
            ("cut_shard_zero3", "cut_zero3"),
            ("llava_shard_zero3", "llava_zero3"),
            ("language_shard_zero2", "language_zero0"),
            ("features_shard_zero2", "features_zero2"),
            ("features_llava_shard_zero3", "features_llava_zero3"),
            ("uld_shard_zero3", "uld_zero3"),
            ("offload_teacher_zero2", "zero2"),
            ("offload_teacher_llava_zero3", "llava_zero3"),
            ("text_shard_zero3", "text_zero0"),
            ("replay_shard_zero3", "replay_zero3"),
            ("several_shard_zero2", "several_zero2"),
            ("several_shard_zero3", "several_zero3"),
            ("together_shard_zero3", "together_zero3"),
            ("mixtures_shard_zero3", "mixtures_zero3"),
        ],
        on_two,
    ),
)
def test_sharded_teacher_equals_replicated(results, name, whole):
    same_weights(results(2, whole), results(2, name), 1e-5)


def test_hidden_states_from_a_server_equal_those_of_a_teacher_here(results):
    here, there = results(2, "llava_zero3"), results(2, "hidden_llava_zero3")
    assert losses(there) == pytest.approx(losses(here), rel=1e-5)
    same_weights(here, there, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rollouts_zero3", "sent_zero3"])
def test_answers_from_a_server_equal_those_drawn_here(results, name):
    here, there = results(2, "greedy_zero3"), results(2, name)
    assert losses(there) == pytest.approx(losses(here), rel=1e-5)
    same_weights(here, there, 1e-5)


@pytest.mark.parametrize("name", marked(["offload_zero2", "offload_zero3", "hpz_zero3"], on_two))
def test_where_shares_lie_changes_nothing(results, name):
    plain = results(2, f"zero{name[-1]}")
    assert losses(results(2, name)) == pytest.approx(losses(plain), rel=1e-5)
    same_weights(plain, results(2, name), 1e-5)


def alone(name):
    return name.removeprefix("sequence_").replace("checkpointing_", "")


@pytest.mark.parametrize(
    "name",
    marked(
        sorted(n for n in scenarios.TWO_RANKS if n.startswith("sequence_")),
        lambda name: [(1, alone(name)), (2, name)],
    ),
)
def test_ranks_that_share_sequences_equal_one(results, name):
    one, two = results(1, alone(name)), results(2, name)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for key in ("samples", "supervised_tokens"):
        assert [line.get(key) for line in two["metrics"]] == [line.get(key) for line in one["metrics"]]
    same_weights(one, two, 1e-5)


@pytest.mark.parametrize(
    "name",
    marked(
        [name for name in scenarios.SHARED if name.startswith("packed_")],
        lambda name: on_two(name, name.removeprefix("packed_")),
    ),
)
def test_packed_equals_padded(results, name):
    packed, padded = results(2, name), results(2, name.removeprefix("packed_"))
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)
    same_weights(padded, packed, 1e-5)
    assert packed["held_out"] == pytest.approx(padded["held_out"], rel=1e-5)


@pytest.mark.parametrize("name", marked(scenarios.RESUMED, lambda name: on_two(name, f"resumed_{name}")))
def test_resumed_equals_uninterrupted(results, name):
    def story(result):
        return [{k: v for k, v in line.items() if k not in tiny.TIMES} for line in result["metrics"]]

    straight, resumed = results(2, name), results(2, f"resumed_{name}")
    assert story(resumed) == story(straight)
    assert resumed["weights"] == straight["weights"]


def test_a_step_may_be_one_teachers_alone(results):
    lines = steps(results(2, "several_zero3"))
    assert [line["teacher/other/share"] for line in lines].count(0) == 1
    assert [("teacher/other/taid" in line) for line in lines].count(False) == 1
    assert all(line["teacher/big/share"] + line["teacher/other/share"] == pytest.approx(1) for line in lines)


def test_several_teachers_are_evaluated_one_by_one(results):
    # The second one is in shards: both ranks ask it together.
    assert results(2, "several_shard_zero3")["evaluated"] == ["student", "teacher_big", "teacher_other"]


def test_dropout_drops(results):
    assert losses(results(2, "dropout_zero2")) != losses(results(2, "zero2"))


def test_ranks_agree_on_running_statistics(results):
    first, second = results(2, "batchnorm_zero2")["statistics"]
    assert first
    assert first == second


def test_activation_checkpointing_changes_nothing(results):
    same_weights(results(1, "zero2"), results(1, "checkpointing_zero2"), 1e-6)
    plain, again = results(2, "features_zero3"), results(2, "features_checkpointing_zero3")
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)
    same_weights(plain, again, 1e-6)


def test_some_steps_are_of_the_students_own_answers(results):
    two, one = steps(results(2, "replay_zero3")), steps(results(1, "replay_zero0"))
    assert {line["on_policy/step"] for line in two} == {0.0, 1.0}
    assert [line["on_policy/tokens"] for line in two] == [line["on_policy/tokens"] for line in one]
    replayed = [line for line in two if line["on_policy/replayed"]]
    assert 0 < len(replayed) < len(two) - 1
    assert any(abs(line["on_policy/importance"] - 1) > 1e-3 for line in replayed)


@pytest.mark.parametrize("name", ["zero0", "mixed_zero3", "bf16_zero2"])
def test_t_is_the_same_on_every_rank(results, name):
    first, second = results(2, name)["t"]
    assert first == second
    assert first[0] > 0.4


@pytest.mark.parametrize("name", marked([f"bf16_zero{stage}" for stage in (0, 2, 3)], on_two))
def test_bfloat16_follows_float32(results, name):
    assert losses(results(2, name)) == pytest.approx(losses(results(2, "zero0")), rel=5e-3)


@pytest.mark.parametrize("name", marked([f"bf16_features_zero{stage}" for stage in (0, 2, 3)], on_two))
def test_bfloat16_follows_float32_with_features(results, name):
    assert losses(results(2, name)) == pytest.approx(losses(results(1, "features_zero0")), rel=2e-2)


@pytest.mark.parametrize("name", marked([f"features_zero{stage}" for stage in range(4)], on_two))
def test_projections_of_features_are_learned_and_not_exported(results, name):
    result = results(2, name)
    projections = [name for name in result["weights"] if name.startswith("losses.")]
    # Two pairs of layers, the vision encoders and the projectors: a weight and a bias each.
    assert len(projections) == 8
    assert result["exported"]
    assert not [name for name in result["exported"] if not name.startswith(("vision_encoder", "projector", "decoder"))]
    assert all(result["moved"].values())
    assert losses(result)[-1] < 0.7 * losses(result)[0]


def test_what_a_loss_does_not_reach_stays(results):
    for world, stage in ((1, 0), (2, 3)):
        moved = results(world, f"layer_zero{stage}")["moved"]
        assert moved["decoder.model.layers.0.mlp.up_proj.weight"]
        assert moved["projector.layers.0.weight"]
        moved = results(world, f"images_zero{stage}")["moved"]
        assert all(changed for name, changed in moved.items() if name.startswith("vision_encoder."))


@pytest.mark.parametrize("name", marked(["ctkd_zero2", "ctkd_zero3", "ctkd_instance_zero3"], on_two))
def test_a_losss_own_parameters_learn_alike(results, name):
    def temperatures(world, name):
        return [line["ctkd/temperature"] for line in steps(results(world, name))]

    one, two = temperatures(1, without_zero(name)), temperatures(2, name)
    assert two == pytest.approx(one, rel=1e-6)
    assert abs(two[-1] - two[0]) > 1e-3


@pytest.mark.parametrize("name", marked(["frozen_zero2", "seeing_once_zero3"], on_two))
def test_frozen_parts_stay_and_others_move(results, name):
    moved = results(2, name)["moved"]
    assert not any(changed for name, changed in moved.items() if name.startswith("vision_encoder."))
    assert all(changed for name, changed in moved.items() if not name.startswith("vision_encoder."))


@pytest.mark.parametrize(
    ("world", "name"),
    marked(
        [(1, "lora_zero0"), (2, "lora_zero3"), (1, "own_base_zero0"), (2, "own_base_zero3")],
        lambda world, name: [(world, name)],
    ),
)
def test_adapters_train_and_their_base_stays(results, world, name):
    result = results(world, name)
    moved = {key for key, changed in result["moved"].items() if changed}
    trained = ("lora_", "projector.") if name.startswith("lora") else ("lora_",)
    assert moved == {key for key in result["moved"] if any(word in key for word in trained)}
    # The student is written as a model of its own.
    assert not [key for key in result["exported"] if "lora_" in key or "base_layer" in key]


@pytest.mark.parametrize(
    ("world", "stage"), marked([(1, 0), (2, 3)], lambda world, stage: [(world, f"own_base_zero{stage}")])
)
def test_a_base_teaches_as_its_copy_does(results, world, stage):
    copied, own = results(world, "copied_base_zero0"), results(world, f"own_base_zero{stage}")
    assert losses(own) == pytest.approx(losses(copied), rel=1e-5)
    same_weights(copied, own, 1e-5)


@pytest.mark.parametrize(
    ("world", "name", "tolerance"),
    marked(
        [*((world, f"ema_zero{s}", 1e-6) for world, s in product((1, 2), (0, 2, 3))), (2, "bf16_ema_zero2", 1e-2)],
        lambda world, name, tolerance: [(world, name)],
    ),
)
def test_a_teacher_that_follows_is_the_average_of_the_weights_after_every_step(results, world, name, tolerance):
    result = results(world, name)
    assert len(losses(result)) == 20
    assert all(difference < tolerance * max(1, spread) for difference, spread in result["averages"].values())
    assert all(result["moved"].values())


@pytest.mark.slow
def test_lora_with_activation_checkpointing(results):
    same_weights(results(2, "lora_zero3"), results(2, "lora_checkpointing_zero3"), 1e-6)


def test_lora_in_bfloat16(results):
    assert losses(results(2, "lora_bf16_zero2")) == pytest.approx(losses(results(1, "lora_zero0")), rel=1e-2)


def test_every_part_trains_by_default(results):
    assert all(results(2, "zero3")["moved"].values())


def test_micro_batches_without_pictures_or_samples(results):
    # 5 of 24 rows are broken, so that a step is smaller and, with two rows a micro-batch, some hold nothing.
    samples = [line["samples"] for line in steps(results(2, "mixed_zero3"))]
    assert sum(samples[:3]) == 19
    assert all(results(2, "mixed_zero3")["moved"].values())


def test_the_teacher_is_in_no_checkpoint(results):
    for name in ("zero2", "shard_zero3"):
        assert results(2, name)["teacher_keys"] == []


@pytest.mark.parametrize(
    ("name", "questions"),
    marked(
        [("eval_zero3", 13), ("eval_frozen_zero3", 13), ("shard_mixed_zero3", 9)], lambda name, questions: on_two(name)
    ),
)
def test_answers_under_zero3(results, name, questions):
    lines = [line for line in results(2, name)["metrics"] if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == ([2, 3] if name == "eval_frozen_zero3" else [3])
    assert all(line["n"] == questions for line in lines)


@pytest.mark.parametrize(
    ("world", "name"),
    marked(
        [(1, "text_zero3"), (2, "text_zero0"), (2, "text_zero3"), (2, "text_shard_zero3")],
        lambda world, name: [(world, name)],
    ),
)
def test_held_out_measures_are_the_same_everywhere(results, world, name):
    def measured(result):
        counts, means = ("step", "data", "n", "tokens"), ("perplexity", "kl", "rouge_l")
        return [
            ([line[key] for key in counts], [line[key] for key in means if key in line])
            for line in result["metrics"]
            if line["kind"] == "eval"
        ]

    expected = measured(results(1, "text_zero0"))
    assert [counts[:3] for counts, _ in expected] == [
        *([2, data, 5] for data in ("text", "data")),
        [3, "text", 19],  # rows: some of the 16 documents are longer than one
        [3, "data", 13],
    ]
    for (counts, means), (others, values) in zip(expected, measured(results(world, name)), strict=True):
        assert others == counts
        assert values == pytest.approx(means, rel=1e-4)
