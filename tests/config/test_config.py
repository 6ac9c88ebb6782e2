"""Every mistake that a person is likely to make in a configuration ends in one line: what, where, what to do."""

from pathlib import Path
from typing import get_args

import pytest
import yaml
from run_files import CLASSIFIER, GOOD, sections_in, write

from data.errors import UserError
from vision.config import ClassifierConfig
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.file import load_config, read_saved, save_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.benchmark_entry import Benchmark
from vlm_distill.losses import Standardised
from vlm_distill.sweeping.sections import SweepSection
from vlm_distill.training.on_policy import check_on_policy
from vlm_distill.training.terms import build_terms


@pytest.mark.parametrize(
    ("changes", "overrides", "says"),
    [
        ({"optimiser": {"lr": 1}}, [], ["optimiser", "did you mean 'optimizer'"]),
        ({"training": {"steps": 10, "batchsize": 3}}, [], ["training.batchsize", "did you mean 'batch_size'"]),
        ({"seed": 3}, [], ["seed: unknown key; it belongs under training"]),
        ({"training": {"steps": 10, "lr": 3}}, [], ["training.lr: unknown key; it belongs under optimizer"]),
        ({}, ["training.trackers=[{name: wandb, projcet: x}]"], ["training.trackers.0.projcet", "mean 'project'"]),
        ({}, ["training.trackers=[wandbs]"], ["training.trackers.0.name: ", "'wandb', 'mlflow' or 'trackio'"]),
        ({}, ["training.trackers=[{name: mlflow, mode: offline}]"], ["trackers.0: only wandb has the key mode"]),
        ({}, ["training.trackers=[wandb, {name: wandb}]"], ["training: trackers names wandb more than once"]),
        ({}, ["training.trackers=wandb"], ["training.trackers: give a list (found 'wandb')"]),
        ({"training": {"steps": 10, "wandb": True}}, [], ["training: wandb is now an entry of trackers: write trac"]),
        ({"training": {"steps": True}}, [], ["training.steps: give a value other than true or false"]),
        ({"output": "~/runs/x"}, [], ["output: ~ is not expanded; write ${oc.env:HOME} or the whole path"]),
        ({"data": {"train": [{"path": "x", "wieght": 2}]}}, [], ["data.train.0.wieght", "did you mean 'weight'"]),
        ({"deepspeed": 3}, [], ["deepspeed: give a mapping with keys such as stage (found 3)"]),
        ({"loss": "taid"}, [], ["loss: give a list (found 'taid')"]),
        ({"loss": []}, [], ["loss: is an empty list; give at least one entry"]),
        ({}, ["output=${nope}"], ["output: Interpolation key 'nope' not found"]),
        ({"loss": ["taid"]}, [], ["loss.0: give a mapping with keys such as name, weight, on (found 'taid')"]),
        ({"training": {"steps": "many"}}, [], ["training.steps", "'many'"]),
        ({"training": {"steps": 10, "epochs": 1}}, [], ["epochs or steps"]),
        ({"training": {"batch_size": 4}}, [], ["epochs or steps"]),
        ({"training": {"steps": 10, "dtype": "fp16"}}, [], ["training.dtype", "'fp32' or 'bf16'"]),
        ({"student": {"path": "a", "decoder": {}}}, [], ["exactly one of path, decoder, from_teacher"]),
        ({"student": {"from_teacher": {"layers": 2}}, "teacher": None}, [], ["student.from_teacher needs a teacher"]),
        ({"student": {"from_teacher": {"layer": 2}}}, [], ["student.from_teacher.layer", "layers"]),
        ({"student": {"from_teacher": {"layers": [2, 1]}}}, [], ["student.from_teacher", "ascending order"]),
        ({"student": {"from_teacher": {"by": "influence"}}}, [], ["student.from_teacher", "set layers to a number"]),
        (
            {"student": {"name": "resnet20"}},
            [],
            ["this file configures an image classifier"],
        ),
        ({"evaluation": {"measures": ["kl"]}, "teacher": None}, [], ["measures: 'kl' needs a teacher section"]),
        ({"deepspeed": {"stage": 4}}, [], ["deepspeed.stage", "4"]),
        ({"deepspeed": {"stage": 2, "zero_optimization": {"stage": 3}}}, [], ["stage differs from stage"]),
        ({}, ["training.steps"], ["section.key=value"]),
        ({}, ["loss.7.weight=1"], ["loss has 1 entry, numbered 0"]),
        ({"loss": [{"name": "kd"}] * 3}, ["loss[3].weight=1"], ["loss has 3 entries, numbered 0 to 2"]),
        ({}, ["loss.weight=1"], ["loss has 1 entry, numbered 0"]),
        ({}, ["loss.-1.weight=1"], ["loss has 1 entry, numbered 0"]),
        ({}, ["data.eval.0.path=x"], ["data.eval has no entries; give it as a list"]),
        ({"data": {"train": [{"path": "x"}], "eval": []}}, ["data.eval.0.path=x"], ["data.eval has no entries"]),
        ({}, ["training.steps.more=1"], ["training.steps is 10, not a section"]),
        ({}, ["output="], ["output: is empty; give a value"]),
        ({}, ["output=' '"], ["output: is empty"]),
        ({"student": {"path": ""}}, [], ["student.path: is empty"]),
        ({"data": {"train": [{"path": ""}]}}, [], ["data.train.0.path: is empty"]),
        ({"data": {"train": [{"path": "x"}], "roots": [""]}}, [], ["data.roots: is empty"]),
        ({"teacher": {"path": "x", "cache": {"folder": ""}}}, [], ["teacher.cache.folder: is empty"]),
        ({"evaluation": {"benchmarks": [""]}}, [], ["evaluation.benchmarks: is empty"]),
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


def test_a_key_emptied_in_a_section_that_is_left_out_leaves_it_out(tmp_path):
    path = write(tmp_path, {"loss": [{"name": "cross_entropy"}]})
    assert load_config(path, ["teacher=null", "teacher.cache=null"]).teacher is None
    with pytest.raises(UserError, match="taecher: unknown key"):
        load_config(path, ["taecher.cache=null"])


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


SHARDED = {"path": "p", "placement": "shard"}
COMPOSED = {"decoder": {"config": {"model_type": "llama"}}, "vision_encoder": {"name": "v"}, "projector": {"depth": 2}}


@pytest.mark.parametrize(
    ("good", "section", "lower", "upper", "left"),
    [
        (GOOD, "training", {"epochs": 3}, {"steps": 5}, {"steps": 5}),
        (GOOD, "training", {"steps": 3}, {"epochs": 5}, {"epochs": 5}),
        (GOOD, "training", {"steps": 3}, {"epochs": None}, {"steps": 3}),
        (GOOD, "student", COMPOSED, {"path": "p"}, {"path": "p"}),
        (GOOD, "student", {"from_teacher": {"layers": 2}}, {"path": "p"}, {"path": "p"}),
        (GOOD, "student", {"path": "p"}, COMPOSED, COMPOSED),
        (GOOD, "student", COMPOSED, {"decoder": {"name": "d"}}, {**COMPOSED, "decoder": {"name": "d"}}),
        (GOOD, "student", COMPOSED, {"from_teacher": {"layers": 2}}, {"from_teacher": {"layers": 2}}),
        (GOOD, "teacher", COMPOSED, {"path": "p"}, {"path": "p"}),
        (GOOD, "teacher", {"path": "p", "placement": "shard"}, {"quantize": "nf4"}, {"path": "p", "quantize": "nf4"}),
        (
            GOOD,
            "teacher",
            {"path": "p", "quantize": "nf4"},
            {"placement": "shard"},
            {"path": "p", "placement": "shard"},
        ),
        (
            GOOD,
            "teacher",
            {"path": "p", "quantize": "nf4", "cache": {"folder": "f"}, "dtype": "bf16"},
            {"server": {"url": "http://h/v1"}},
            {"path": "p", "server": {"url": "http://h/v1"}},
        ),
        (
            GOOD,
            "teacher",
            {"path": "p", "server": {"url": "http://h/v1"}},
            {"cache": {"folder": "f"}},
            {"path": "p", "cache": {"folder": "f"}},
        ),
        (GOOD, "deepspeed", {"stage": 3}, {"zero_optimization": {"stage": 1}}, {"stage": 1}),
        (GOOD, "deepspeed", {"zero_optimization": {"stage": 3}}, {"stage": 0}, {"stage": 0}),
        (CLASSIFIER, "teacher", {"name": "a", "pretrained": True}, {"weights": "w"}, {"name": "a", "weights": "w"}),
        (CLASSIFIER, "student", {"name": "a", "weights": "w"}, {"pretrained": True}, {"name": "a", "pretrained": True}),
        (
            CLASSIFIER,
            "optimizer",
            {"schedule": "multistep", "milestones": [3]},
            {"schedule": "cosine"},
            {"schedule": "cosine"},
        ),
        (
            CLASSIFIER,
            "optimizer",
            {"schedule": "multistep", "milestones": [3]},
            {"milestones": [5]},
            {"schedule": "multistep", "milestones": [5]},
        ),
    ],
)
def test_a_later_layer_replaces_an_earlier_choice(tmp_path, good, section, lower, upper, left):
    kind = RunConfig if good is GOOD else ClassifierConfig
    expected = kind.model_validate(good | {section: left})
    base = write(tmp_path, {section: lower}, good=good)
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"base": "run.yaml", section: upper}))
    flat = [f"{section}.{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in upper.items()]
    overrides = [text.removesuffix("\n").removesuffix("\n...") for text in flat]
    for config in (load_config(child, (), kind), load_config(base, overrides, kind)):
        assert config.model_dump(exclude_defaults=True) == expected.model_dump(exclude_defaults=True)


def test_alternatives_of_one_layer_are_refused(tmp_path):
    path = write(tmp_path, {"training": {"epochs": 3}})
    for words in (["training.steps=5", "training.epochs=1"], ["training={steps: 5, epochs: 1}"]):
        with pytest.raises(UserError, match="epochs or steps"):
            load_config(path, words)


def test_a_base_named_many_times_is_read_once(tmp_path):
    write(tmp_path, name="0.yaml")
    for level in range(1, 40):
        (tmp_path / f"{level}.yaml").write_text(f"base: [{level - 1}.yaml, {level - 1}.yaml]\n")
    assert load_config(tmp_path / "39.yaml").training.steps == 10


@pytest.mark.parametrize(
    "text", ["${x}", "a\\${x}", "${", "\\\\${x} ${oc.env:HOME} C:\\dir", "$", "$$ {", "%{x}", "\\"]
)
def test_values_like_interpolations_survive_saving(tmp_path, monkeypatch, text):
    monkeypatch.setenv("ODD_NAME", text)
    config = load_config(write(tmp_path), ["output=${oc.env:ODD_NAME}"])
    assert config.output == text
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert read_saved(tmp_path / "saved.yaml")["output"] == text


def test_null_in_place_of_a_default_survives_saving(tmp_path):
    config = load_config(write(tmp_path, {"optimizer": {"max_grad_norm": None}}))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert load_config(tmp_path / "saved.yaml").optimizer.max_grad_norm is None
    # No other key needs that.
    found = set()
    for section in sections_in(RunConfig) | sections_in(ClassifierConfig):
        for name, field in section.model_fields.items():
            takes_null = type(None) in get_args(field.annotation)
            if takes_null and not field.is_required() and field.default is not None:
                found.add(name)
    assert found == {"max_grad_norm"}


BOMBS = {
    "doubling": "a0: xxxxxxxxxx\n" + "".join(f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}\n" for i in range(1, 60)),
    "sections": "a0: {x: 1}\n" + "".join(f"a{i}: {{x: '${{a{i - 1}}}', y: '${{a{i - 1}}}'}}\n" for i in range(1, 60)),
    "chain": "a0: x\n" + "".join(f"a{i}: ${{a{i - 1}}}\n" for i in range(1, 3000)),
    "relative": "s:\n  a0: xxxxxxxx\n" + "".join(f"  a{i}: '${{.a{i - 1}}}${{.a{i - 1}}}'\n" for i in range(1, 60)),
    "indirect": "n: {a0: x}\na0: xxxx\n"
    + "".join(f"k{i}: a{i - 1}\na{i}: '${{${{k{i}}}}}${{${{k{i}}}}}'\n" for i in range(1, 40)),
    "selected": "a0: xxxx\n"
    + "".join(f"a{i}: '${{oc.select:a{i - 1}}}${{oc.select:a{i - 1}}}'\n" for i in range(1, 60)),
    "circle": "a: ${b}${b}\nb: ${a}${a}\n",
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    "merges": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_configurations_that_would_grow_without_bounds_are_refused(tmp_path, name):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["root:*:19000:0:99999:7:::\ndaemon:*:1:\n", "top secret\nmore: secret: x", "'secret", "a: *secret", "!secret x"],
)
def test_a_base_that_is_no_configuration_is_not_quoted(tmp_path, text):
    (tmp_path / "shadow").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, {"base": "shadow"}))
    message = str(caught.value).replace(str(tmp_path), "")
    assert "secret" not in message
    assert "root" not in message


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
        ({"student": {"decoder": {"config": {}}, "lora": {"merge": False}}}, "an adapter refers to a base on disk"),
        ({"student": {"path": "base", "quantize": "nf4"}}, "add lora, or leave quantize out"),
        ({"student": {**LORA, "quantize": "nf4"}}, "set lora.merge to false"),
        (
            {"student": {"path": "b", "quantize": "nf4", "lora": {"merge": False}}, "deepspeed": {"stage": 3}},
            "ZeRO-3 cannot shard 4-bit weights",
        ),
        ({"teacher": {"path": "x", "ema": 0.9}}, "ema: averages the student's weights"),
        ({"teacher": {"path": "x", "view": {"images": "full"}}}, "'full' is for teacher.from_student"),
        ({**OWN, "student": {"from_teacher": {"layers": 2}, "lora": {}}}, "one of the two models must be on disk"),
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


@pytest.mark.parametrize("root", [RunConfig, ClassifierConfig, SweepSection, Benchmark])
def test_every_key_has_a_description(root):
    sections = sections_in(root)
    assert len(sections) > 1
    fields = {f"{s.__name__}.{name}": field for s in sections for name, field in s.model_fields.items()}
    assert [name for name, field in fields.items() if not (field.description or "").endswith(".")] == []


# Those of classifiers are in tests/vision/test_recipes.py.
FOLDERS = [Path("configs", name) for name in ("demo", "language", "vlm")]
RUNS = [path for folder in FOLDERS for path in sorted(folder.rglob("*.yaml")) if "vision" not in path.parts]


@pytest.mark.parametrize("path", RUNS, ids=str)
def test_shipped_configurations_are_valid(path):
    config = load_config(path)
    check_on_policy(config, build_terms(config))
    split_batch(config, 2)
