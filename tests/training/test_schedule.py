import pytest
from torch import nn

from data.errors import UserError
from vlm_distill.training.schedule import learning_rate_factor, lr_scales, parameter_groups


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


def parts():
    model = nn.ModuleDict({"vision_encoder": nn.Linear(2, 2), "projector": nn.LayerNorm(2), "decoder": nn.Linear(2, 2)})
    return model, dict(model.items())


def test_parts_have_learning_rates_of_their_own():
    model, named = parts()
    groups = parameter_groups(model, 0.1, lr_scales(named, {"vision_encoder": 2e-6, "projector": 1e-3}, 1e-5))
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    vision, projector, decoder = named.values()
    assert found == {
        id(vision.weight): (pytest.approx(0.2), 0.1),
        id(vision.bias): (pytest.approx(0.2), 0.0),
        id(projector.weight): (pytest.approx(100.0), 0.0),
        id(projector.bias): (pytest.approx(100.0), 0.0),
        id(decoder.weight): (1.0, 0.1),
        id(decoder.bias): (1.0, 0.0),
    }


def test_a_part_that_is_not_there_or_does_not_train_has_no_learning_rate():
    _, named = parts()
    named["vision_encoder"].requires_grad_(False)
    with pytest.raises(UserError, match=r"^optimizer.part_lr: the vision_encoder does not train; .*student.train$"):
        lr_scales(named, {"vision_encoder": 1e-6}, 1e-5)
    del named["projector"]
    with pytest.raises(UserError, match=r"has no projector; it has vision_encoder, decoder$"):
        lr_scales(named, {"projector": 1e-6}, 1e-5)
