"""Every mistake that a person is likely to make in a configuration ends in one line: what, where, what to do."""

from pathlib import Path

import pytest
import yaml

from data.errors import UserError
from vlm_distill.config import split_batch
from vlm_distill.config_file import load_config, save_config
from vlm_distill.losses import Standardised
from vlm_distill.training.build import build_terms
from vlm_distill.training.on_policy import check_on_policy

GOOD = {
    "student": {"path": "student"},
    "teacher": {"path": "teacher"},
    "loss": [{"name": "taid", "t_start": 0.2}],
    "data": {"train": [{"path": "train.jsonl"}]},
    "training": {"steps": 10, "batch_size": 64},
    "output": "runs/x",
}


def write(folder, changes=None, drop=()):
    plain = {k: v for k, v in GOOD.items() if k not in drop} | (changes or {})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


@pytest.mark.parametrize(
    ("changes", "overrides", "says"),
    [
        ({"optimiser": {"lr": 1}}, [], ["optimiser", "did you mean 'optimizer'"]),
        ({"training": {"steps": 10, "batchsize": 3}}, [], ["training.batchsize", "did you mean 'batch_size'"]),
        ({"data": {"train": [{"path": "x", "wieght": 2}]}}, [], ["data.train.0.wieght", "did you mean 'weight'"]),
        ({"training": {"steps": "many"}}, [], ["training.steps", "'many'"]),
        ({"training": {"steps": 10, "epochs": 1}}, [], ["epochs or steps"]),
        ({"training": {"batch_size": 4}}, [], ["epochs or steps"]),
        ({"training": {"steps": 10, "dtype": "fp16"}}, [], ["training.dtype", "'fp32' or 'bf16'"]),
        ({"student": {"path": "a", "decoder": {}}}, [], ["exactly one of path, decoder, from_teacher"]),
        ({"student": {"from_teacher": {"layers": 2}}, "teacher": None}, [], ["student.from_teacher needs a teacher"]),
        (
            {"student": {"from_teacher": {"layers": 2}}, "teacher": {"path": "a", "placement": "shard"}},
            [],
            ["no student can be cut from a sharded teacher"],
        ),
        ({"student": {"name": "resnet20"}}, [], ["an image classifier (student.name), which vlm-distill classify"]),
        ({"evaluation": {"measures": ["kl"]}, "teacher": None}, [], ["kl is that from a teacher, and there is none"]),
        ({"deepspeed": {"stage": 4}}, [], ["deepspeed.stage", "4"]),
        ({"deepspeed": {"stage": 2, "zero_optimization": {"stage": 3}}}, [], ["is another one than stage"]),
        ({}, ["training.steps"], ["section.key=value"]),
        ({}, ["loss.7.weight=1"], ["loss.7.weight=1"]),
        ({}, ["training.seed=-1"], ["training.seed"]),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, changes, overrides, says):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, changes), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for words in says:
        assert words in message


@pytest.mark.parametrize("key", ["student", "loss", "data", "training", "output"])
def test_missing_section(tmp_path, key):
    with pytest.raises(UserError, match=f"{key}: missing"):
        load_config(write(tmp_path, drop=[key]))


@pytest.mark.parametrize(("text", "says"), [("- a\n- b\n", "mapping"), ("a: [", "YAML"), ("", "missing")])
def test_files_that_are_no_configuration(tmp_path, text, says):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_config(path)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "nowhere.yaml")


def test_overrides_and_base(tmp_path):
    write(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("base: run.yaml\nloss: [{name: cross_entropy}]\noutput: runs/y\n")
    config = load_config(child, ["training.steps=20", "data.train.0.weight=0.5", "optimizer.betas=[0.8,0.9]"])
    assert config.loss[0].name == "cross_entropy"
    assert (config.output, config.training.steps) == ("runs/y", 20)
    assert config.data.train[0].weight == 0.5
    assert config.optimizer.betas == (0.8, 0.9)


def test_bases_are_merged_in_their_order(tmp_path):
    write(tmp_path)
    (tmp_path / "first.yaml").write_text("training: {batch_size: 8, seed: 1}\noptimizer: {lr: 0.5}\n")
    (tmp_path / "second.yaml").write_text("training: {seed: 2}\nloss: [{name: kd}, {name: cross_entropy}]\n")
    (tmp_path / "deeper").mkdir()
    child = tmp_path / "deeper" / "child.yaml"
    child.write_text("base: [../run.yaml, ../first.yaml, ../second.yaml]\noutput: runs/y\n")
    config = load_config(child)
    assert (config.training.batch_size, config.training.seed, config.training.steps) == (8, 2, 10)
    assert (config.optimizer.lr, config.output) == (0.5, "runs/y")
    assert [section.name for section in config.loss] == ["kd", "cross_entropy"]
    # Two bases may stand on the same one, which is no circle.
    (tmp_path / "second.yaml").write_text("base: first.yaml\ntraining: {seed: 3}\n")
    assert load_config(child).training.seed == 3
    child.write_text("base: [../run.yaml, child.yaml]\n")
    with pytest.raises(UserError, match="circle"):
        load_config(child)
    child.write_text("base: [../run.yaml, ../nowhere.yaml]\n")
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such configuration"):
        load_config(child)


def test_base_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="circle"):
        load_config(tmp_path / "a.yaml")


def test_saved_configuration_reads_back_the_same(tmp_path):
    config = load_config(write(tmp_path, {"deepspeed": {"stage": 3, "zero_optimization": {"overlap_comm": True}}}))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(("batch", "micro", "world", "split"), [(64, None, 2, (32, 1)), (64, 4, 2, (4, 8))])
def test_batch_splits_evenly(tmp_path, batch, micro, world, split):
    training = {"steps": 1, "batch_size": batch, "micro_batch_size": micro}
    assert split_batch(load_config(write(tmp_path, {"training": training})), world) == split


def test_batch_that_does_not_split(tmp_path):
    training = {"steps": 1, "batch_size": 64, "micro_batch_size": 12}
    with pytest.raises(UserError, match=r"64 is not divisible by micro_batch_size 12 × 2 rank.*48, 72"):
        split_batch(load_config(write(tmp_path, {"training": training})), 2)


LORA = {"path": "base", "lora": {"rank": 8}}
OWN = {"teacher": {"from_student": True}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {**LORA, "train": ["decoder"]}}, "train and lora.parts both name the decoder"),
        ({"student": {"path": "base", "lora": {"rnk": 8}}}, r"student\.lora\.rnk: unknown key; did you mean 'rank'"),
        ({"student": {"decoder": {"config": {}}, "lora": {"merge": False}}}, "whose base must be on disk"),
        ({"student": {"path": "base", "quantize": "nf4"}}, "add lora, or leave quantize out"),
        ({"student": {**LORA, "quantize": "nf4"}}, "set lora.merge to false"),
        (
            {"student": {"path": "b", "quantize": "nf4", "lora": {"merge": False}}, "deepspeed": {"stage": 3}},
            "ZeRO-3 does not shard weights of 4 bits",
        ),
        ({**OWN, "student": {"path": "base"}}, "from_student needs a student trained by student.lora alone"),
        ({**OWN, "student": {**LORA, "train": ["projector"]}}, "needs a student trained by student.lora alone"),
        ({**OWN, "student": {"from_teacher": {"layers": 2}, "lora": {}}}, "one of the two must be on disk"),
        ({"student": LORA, "teacher": {"from_student": True, "dtype": "bf16"}}, "leave dtype out"),
        (
            {"student": LORA, "teacher": {"from_student": True, "path": "x"}},
            "exactly one of path, decoder, from_st",
        ),
    ],
)
def test_lora_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, changes))


def test_what_trains_beside_adapters_is_saved_as_it_was_said(tmp_path):
    for student, whole in ((LORA, []), ({"path": "base"}, ["vision_encoder", "projector", "decoder"])):
        config = load_config(write(tmp_path, {**(OWN if student is LORA else {}), "student": student}))
        save_config(config, tmp_path / "saved.yaml")
        again = load_config(tmp_path / "saved.yaml")
        assert again == config
        assert again.student.trained_whole == whole


def test_loss_without_its_teacher(tmp_path):
    with pytest.raises(UserError, match="taid needs a teacher"):
        build_terms(load_config(write(tmp_path, drop=["teacher"])))


def test_recomputed_logits_are_for_losses_that_need_no_whole_rows(tmp_path):
    training = {"steps": 1, "recompute_logits": True}
    for name, kept in (("taid", True), ("adaptive_kl", False)):
        config = load_config(write(tmp_path, {"loss": [{"name": name}], "training": training}))
        if kept:
            build_terms(config)
        else:
            with pytest.raises(UserError, match=r"loss adaptive_kl needs whole rows of logits; leave it or training"):
                build_terms(config)


def test_standardised_losses_and_those_of_classifiers(tmp_path):
    def terms(loss, **training):
        changes = {"loss": [loss], "training": {"steps": 1, **training}}
        return build_terms(load_config(write(tmp_path, changes)))

    (term,) = terms({"name": "kd", "temperature": 2, "standardise": True})
    assert isinstance(term.loss, Standardised)
    assert term.loss.inner.temperature == 2.0
    with pytest.raises(UserError, match="loss kd needs whole rows of logits"):
        terms({"name": "kd", "standardise": True}, recompute_logits=True)
    with pytest.raises(UserError, match="no loss is called 'mlkd'"):  # it compares images of a batch
        terms({"name": "mlkd"})


@pytest.mark.parametrize(("name", "refused"), [("taid", False), ("cross_entropy", True)])
def test_answers_that_no_loss_may_read(tmp_path, name, refused):
    changes = {"data": {"train": [{"path": "x.jsonl", "labelled": False}]}, "loss": [{"name": name}]}
    config = load_config(write(tmp_path, changes))
    if refused:
        with pytest.raises(UserError, match=r"cross_entropy reads the answers, and x\.jsonl is not labelled"):
            build_terms(config)
    else:
        build_terms(config)


def test_no_such_loss(tmp_path):
    with pytest.raises(UserError, match=r"forwardkl.*forward_kl"):
        build_terms(load_config(write(tmp_path, {"loss": [{"name": "forwardkl"}]})))


def test_terms_of_one_loss_are_numbered(tmp_path):
    config = load_config(write(tmp_path, {"loss": [{"name": "jsd", "beta": 0.1}, {"name": "jsd", "beta": 0.9}]}))
    assert [term.name for term in build_terms(config)] == ["jsd", "jsd_2"]


# Those of classifiers are in tests/vision/test_recipes.py.
FOLDERS = [Path("configs", name) for name in ("demo", "language", "vlm")]
RUNS = [path for folder in FOLDERS for path in sorted(folder.rglob("*.yaml")) if "vision" not in path.parts]


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_shipped_configurations_are_valid(path):
    config = load_config(path)
    check_on_policy(config, build_terms(config))
    split_batch(config, 2)
