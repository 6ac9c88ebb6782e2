"""Families of Transformers under several ranks: the same losses and weights as on one, whole and in shards."""

import itertools
from pathlib import Path

import families
import family_ranks
import pytest
import tiny
from launches import on_one_rank_and_two

pytestmark = pytest.mark.slow
RUNS = [f"{name}_zero{stage}" for name, stage in itertools.product(family_ranks.FAMILIES, family_ranks.STAGES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, make_tokenizer):
    folder = tmp_path_factory.mktemp("family_ranks")
    maker = families.Maker(make_tokenizer)
    for seed, name in enumerate([*family_ranks.FAMILIES, *family_ranks.SHARDED]):
        maker.write(name, folder / name, seed=seed)
    # One rank's micro-batch has no picture while another's has one, and one is empty.
    tiny.write_data(folder / "data", text_only=(0, 1, 2, 3, 8, 9), broken=(4, 5, 6, 7))
    return on_one_rank_and_two(Path(family_ranks.__file__), folder)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one(results, name):
    one, two = results(1, name), results(2, name)
    assert len(one["lines"]) == len(two["lines"]) == 2
    for key in ("loss", "forward_kl/loss", "cross_entropy/loss"):
        assert [line[key] for line in two["lines"]] == pytest.approx([line[key] for line in one["lines"]], rel=1e-4)
    for key in ("samples", "supervised_tokens"):
        assert [line[key] for line in two["lines"]] == [line[key] for line in one["lines"]]
    same_weights(one, two)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("world", [1, 2])
def test_every_stage_equals_none(results, world, name):
    same_weights(results(world, f"{name[:-1]}0"), results(world, name))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("world", [1, 2])
def test_every_stage_writes_tied_weights_once(results, world, name):
    assert results(world, name)["saved"] == results(world, f"{name[:-1]}0")["saved"]
    if name.startswith("qwen2_5_vl"):
        assert "lm_head.weight" not in results(world, name)["saved"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", family_ranks.SHARDED)
def test_experts_in_shards_are_those_of_the_whole_model(results, world, name):
    assert results(world, "sharded")[name] < 1e-5


def same_weights(a, b):
    assert a["weights"].keys() == b["weights"].keys()
    for name, values in a["weights"].items():
        assert b["weights"][name] == pytest.approx(values, abs=2e-5), name
