"""Every optimizer trains at the ZeRO stages it allows, resumes, and is refused where it cannot work."""

import json

import pytest
import tiny
import torch

from data.errors import UserError
from vlm_distill.config.sections import OptimizerSection, RunConfig
from vlm_distill.trainer import Trainer
from vlm_distill.training import optimizers
from vlm_distill.training.effects import idle_settings

MUON = {"optimizer__max_grad_norm": None, "optimizer__muon_lr": 0.01}
OTHERS = {"sgd": {"optimizer__lr": 0.1}, "adamw8bit": {}, "muon": MUON}


@pytest.fixture(autouse=True)
def not_compiled():
    """DeepSpeed compiles Muon's iteration, which takes minutes here and changes nothing but the time."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    return tiny.write_data(folder / "data"), tiny.write_teacher(folder / "teacher")


@pytest.fixture
def trained(files, processes, tmp_path):
    """Trains; returns the losses and the student's weights."""

    def train(name, folder, until=None, stage=0, **changes):
        changes |= {"optimizer__name": name, "deepspeed__stage": stage, "training__steps": 4}
        plain = tiny.config(tmp_path / folder, *files, **OTHERS.get(name, {}), **changes)
        trainer = Trainer(RunConfig.model_validate(plain), processes)
        trainer.run(until)
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        weights = torch.cat([tensor.flatten() for tensor in trainer.student_state().values()])
        return [line["loss"] for line in lines if line["kind"] == "train"], weights

    return train


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", OTHERS)
def test_zero_stages_train_the_same_student(trained, name, stage):
    plain, weights = trained(name, "plain")
    sharded, others = trained(name, "sharded", stage=stage)
    assert len(set(plain)) == 4
    # Eight bits are rounded by blocks of 256, which begin elsewhere in ZeRO's flat tensors: where a gradient is hardly
    # more than rounding, AdamW takes a whole step of the learning rate, 0.01, in either direction.
    assert sharded == pytest.approx(plain, rel=1e-2 if name == "adamw8bit" else 1e-5)
    assert torch.allclose(others, weights, atol=0.05 if name == "adamw8bit" else 1e-5)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", OTHERS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trained, name, stage):
    straight, weights = trained(name, "straight", stage=stage)
    trained(name, "stopped", stage=stage, until=2)
    resumed, others = trained(name, "stopped", stage=stage)
    assert resumed == straight
    assert torch.equal(others, weights)


@pytest.mark.parametrize("name", ["adamw8bit", "muon"])
def test_states_that_belong_to_a_stage_are_not_restored_at_another(trained, name):
    trained(name, "moved", stage=1, until=2)
    with pytest.raises(UserError, match=f"another ZeRO stage wrote it, which {name} cannot be restored from"):
        trained(name, "moved", stage=0)


def test_sgd_goes_on_at_another_stage(trained):
    straight, _ = trained("sgd", "straight", stage=0)
    trained("sgd", "moved", stage=2, until=2)
    assert trained("sgd", "moved", stage=0)[0] == pytest.approx(straight, rel=1e-5)


def test_sgd_steps_in_main_memory(trained):
    straight, _ = trained("sgd", "straight", stage=2)
    offloaded = {"deepspeed__zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert trained("sgd", "offloaded", stage=2, **offloaded)[0] == pytest.approx(straight, rel=1e-5)


def test_muon_leaves_embeddings_norms_biases_and_the_head_to_adamw(files, processes, tmp_path):
    plain = tiny.config(tmp_path / "out", *files, optimizer__name="muon", **MUON)
    student = Trainer(RunConfig.model_validate(plain), processes).student
    by_muon = {name for name, parameter in student.named_parameters() if parameter.use_muon}
    assert all(parameter.ndim == 2 for name, parameter in student.named_parameters() if name in by_muon)
    assert any(name.endswith("q_proj.weight") for name in by_muon)
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in by_muon)


def test_adamw_is_torchs_fused_one():
    section, model = OptimizerSection(), torch.nn.Linear(2, 2)
    made = optimizers.build_optimizer(model, section, {})
    plain = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, fused=True)
    assert type(made) is torch.optim.AdamW
    assert {k: v for k, v in made.defaults.items() if k != "weight_decay"} == {
        k: v for k, v in plain.defaults.items() if k != "weight_decay"
    }
    assert [group["weight_decay"] for group in made.param_groups] == [0.01, 0.0]


@pytest.mark.parametrize(
    ("section", "deepspeed", "message"),
    [
        ({"name": "muon"}, {}, "max_grad_norm: ZeRO would clip the updates of 'muon'"),
        ({"name": "muon", "max_grad_norm": None}, {"stage": 3}, "'muon' reads whole matrices, which ZeRO 3 cuts up"),
        ({"name": "adamw8bit"}, {"stage": 3}, "'adamw8bit' does not work under ZeRO 3"),
        (
            {"name": "adamw8bit"},
            {"stage": 2, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "cannot step in main memory",
        ),
    ],
)
def test_what_cannot_work_is_refused(files, tmp_path, section, deepspeed, message):
    plain = tiny.config(tmp_path / "out", *files, optimizer=section, deepspeed=deepspeed)
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(plain)


def test_8_bit_adamw_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    section = OptimizerSection(name="adamw8bit")
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        optimizers.build_optimizer(torch.nn.Linear(2, 2), section, {})


def test_settings_of_another_optimizer_are_named(files, tmp_path):
    plain = tiny.config(tmp_path / "out", *files, optimizer={"name": "sgd", "betas": [0.5, 0.9], "muon_lr": 0.1})
    assert idle_settings(RunConfig.model_validate(plain)) == [
        "optimizer.betas: has no effect with name: sgd",
        "optimizer.muon_lr: has no effect with name: sgd",
    ]


@pytest.mark.parametrize(("name", "expected"), [("adamw", 8), ("sgd", 4), ("adamw8bit", 2), ("muon", 6)])
def test_a_plan_counts_the_states_of_the_optimizer(name, expected):
    """Half of the numbers are a matrix that Muon updates, half are an embedding."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Embedding(8, 4))
    assert optimizers.state_bytes(model, OptimizerSection(name=name), []) == expected
