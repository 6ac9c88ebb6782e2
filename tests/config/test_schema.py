"""The JSON schema of configurations accepts every file that ships, describes every key, and refuses misspelt ones."""

import json

import pytest
from run_files import sections_in

from vision.config import REGISTRY as CLASSIFIERS_LOSSES
from vision.config import ClassifierConfig
from vlm_distill.config import shipped
from vlm_distill.config.file import read_yaml
from vlm_distill.config.schema import json_schema
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.benchmark_entry import Benchmark
from vlm_distill.losses import REGISTRY
from vlm_distill.sweeping.sections import SweepSection

jsonschema = pytest.importorskip("jsonschema")

SCHEMAS = {
    "train": json_schema(RunConfig, REGISTRY),
    "classify": json_schema(ClassifierConfig, CLASSIFIERS_LOSSES),
    "sweep": json_schema(SweepSection),
    "eval": json_schema(Benchmark),
}
SCHEMAS["eval"]["required"].remove("name")
PARTS = sorted(path.relative_to(shipped.FOLDER).with_suffix("") for path in shipped.FOLDER.rglob("base/*.yaml"))
FILES = [name for name in shipped.names() if shipped.command_of(name) in SCHEMAS]
FILES += ["demo/vision/base", *(path.as_posix() for path in PARTS)]


def mistakes(command, content):
    """Return where a file's content is wrong, as dotted keys and messages, those of alternatives included."""
    found = list(jsonschema.Draft7Validator(SCHEMAS[command]).iter_errors(content))
    for error in found:
        found += error.context
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


@pytest.mark.parametrize("name", SCHEMAS)
def test_it_is_a_schema_and_what_the_command_prints(name, command):
    jsonschema.Draft7Validator.check_schema(SCHEMAS[name])
    code, said, _ = command("schema", name)
    assert code == 0
    assert json.loads(said) == SCHEMAS[name]


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_ships_is_accepted(name):
    assert mistakes(shipped.command_of(name), read_yaml(shipped.FOLDER / f"{name}.yaml")) == []


@pytest.mark.parametrize(
    ("command", "content", "where"),
    [
        ("train", {"traning": {}}, "'traning' was unexpected"),
        ("train", {"training": {"stepz": 3}}, "'stepz' was unexpected"),
        ("train", {"training": {"steps": "many"}}, "training.steps: "),
        ("train", {"training": {"steps": 0}}, "training.steps: "),
        ("train", {"training": {"dtype": "fp16"}}, "training.dtype: "),
        ("train", {"training": {"trackers": ["wandbs"]}}, "training.trackers.0: "),
        ("train", {"training": {"trackers": [{"project": "x"}]}}, "training.trackers.0: "),
        ("train", {"loss": [{"name": "tied"}]}, "loss.0.name: "),
        ("train", {"loss": [{"name": "taid", "t_strat": 0.4}]}, "'t_strat' was unexpected"),
        ("train", {"loss": [{"weight": 1}]}, "loss.0: 'name' is a required property"),
        ("train", {"data": {"train": [{"paht": "x"}]}}, "'paht' was unexpected"),
        ("train", {"deepspeed": {"stage": 4}}, "deepspeed"),
        ("train", {"deepspeed": {"zero_optimization": {"overlap_com": True}}}, "deepspeed"),
        ("train", {"student": {"projector": "theirs"}}, "student.projector: "),
        ("classify", {"student": {"path": "x"}}, "'path' was unexpected"),
        ("classify", {"loss": [{"name": "uld"}]}, "loss.0.name: "),
        ("classify", {"data": {"views": [{"crop": "square"}]}}, "data.views.0.crop: "),
        ("sweep", {"config": "x", "output": "y", "axis": {}}, "'axis' was unexpected"),
        ("eval", {"tsv": {"name": "X"}, "scorer": "choice", "promt": "x"}, "'promt' was unexpected"),
    ],
)
def test_mistakes_are_refused(command, content, where):
    found = mistakes(command, content)
    assert found
    assert any(where in mistake for mistake in found), found


@pytest.mark.parametrize(
    "content",
    [
        {"base": ["a.yaml", "b.yaml"]},
        {"training": {"steps": "${oc.env:STEPS,500}", "trackers": ["wandb", {"name": "mlflow", "project": "x"}]}},
        {"data": {"workers": "${oc.env:WORKERS}"}, "teacher": None, "optimizer": {"betas": ["${b}", 0.9]}},
        {"deepspeed": "ds_config.json"},
        {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "train_batch_size": "auto"}},
        {"student": {"projector": "teacher"}},
        {"student": {"from_teacher": {"layers": [0, 3], "vision_encoder": {"layers": 4}}}},
        {"teacher": {"view": {"images": {"blur": 8}}}},
        {"loss": [{"name": "my_package.losses:Mine", "anything": 1}, {"name": "kd", "standardise": True}]},
    ],
)
def test_layers_and_short_forms_are_accepted(content):
    assert mistakes("train", content) == []


@pytest.mark.parametrize(("command", "kind"), [("train", RunConfig), ("classify", ClassifierConfig)])
def test_every_key_has_its_description_and_its_default(command, kind):
    found = {**SCHEMAS[command]["definitions"], kind.__name__: SCHEMAS[command]}
    for section in sections_in(kind):
        for name, field in section.model_fields.items():
            shown = found[section.__name__]["properties"][name]
            if "description" not in shown:  # pydantic leaves out what the section's own docstring says
                (used,) = sections_in(field.annotation)
                shown = shown | {"description": found[used.__name__]["description"]}
            assert shown["description"] == field.description, (section.__name__, name)
            if not field.is_required() and isinstance(field.default, int | float | str | None):
                assert shown["default"] == field.default, (section.__name__, name)
