import pytest
from torch import nn

from vlm_distill.training.schedule import learning_rate_factor, parameter_groups


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_rises_then_falls_to_the_floor(schedule):
    factors = [learning_rate_factor(s, 100, schedule, 0.1, 0.2) for s in range(100)]
    assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert factors[10] == 1.0
    assert factors[-1] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_constant_and_warmup_in_steps():
    assert [learning_rate_factor(s, 10, "constant", 2, 0.0) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_halfway_of_a_cosine():
    assert learning_rate_factor(50, 101, "cosine", 0, 0.0) == pytest.approx(0.5)


def test_one_step():
    assert learning_rate_factor(0, 1, "cosine", 0.0, 0.0) == 1.0


def test_only_matrices_decay():
    model = nn.Module()
    model.embed, model.norm, model.linear = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)
    model.head = nn.Linear(4, 5, bias=False)
    model.head.weight = model.embed.weight
    model.frozen = nn.Linear(4, 4).requires_grad_(False)
    model.cls_token = nn.Parameter(model.linear.weight.new_zeros(1, 1, 4))
    decay, rest = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decay["params"]] == [id(model.linear.weight)]
    assert {id(p) for p in rest["params"]} == {
        id(p) for p in (model.embed.weight, model.norm.weight, model.norm.bias, model.linear.bias, model.cls_token)
    }
