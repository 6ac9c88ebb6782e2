"""The configurations that ship are listed with what they are, and copied with what they build on."""

import csv
import re
from pathlib import Path

import pytest

from data.errors import UserError
from vision.config import ClassifierConfig
from vlm_distill.config import shipped
from vlm_distill.config.file import load_config, merged_config, read_yaml
from vlm_distill.config.sections import RunConfig

PLANS = Path("benchmarks/results/recipe_plans.csv")
PAIR = "imagenet/resnet34_resnet18/kd"
KINDS = {"train": RunConfig, "classify": ClassifierConfig}


def test_all_but_parts_are_listed():
    parts = {path for path in Path("configs").rglob("*.yaml") if "base" in (*path.parts, path.stem)}
    assert {Path("configs", f"{name}.yaml") for name in shipped.names()} | parts == set(Path("configs").rglob("*.yaml"))
    assert not any("base" in name for name in shipped.names())


@pytest.mark.parametrize("name", shipped.names())
def test_each_says_what_it_is_and_which_command_takes_it(name):
    assert 20 < len(shipped.about(name)) < 250
    content = read_yaml(shipped.FOLDER / f"{name}.yaml")
    if "axes" in content:
        assert shipped.command_of(name) == "sweep"
    elif "scorer" in content:
        assert shipped.command_of(name) == "eval"
    else:
        student = merged_config(shipped.FOLDER / f"{name}.yaml")["student"]
        assert shipped.command_of(name) == ("classify" if "name" in student else "train")


with PLANS.open() as file:
    PLANNED = {row["recipe"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", [n for n in shipped.names() if n.startswith(("vlm/", "language/"))])
def test_a_recipe_says_what_it_needs_as_it_was_planned(name):
    if name in ("vlm/plan_example", "language/smollm2_every_third"):  # planned in the docs; for a CPU
        return
    text, row = shipped.text_of(name), PLANNED[name]
    header = text[: re.search(r"^[^#]", text, re.M).start()]
    found = dict(re.findall(r"^# (Needs|Data|Time|Plan|Start): +(.*)$", header, re.M))
    assert list(found) == ["Needs", "Data", "Time", "Plan", "Start"]
    assert found["Needs"].startswith(f"{row['gpus']} GPU")
    assert f" {row['peak_gb']} GB" in found["Needs"]
    assert (row["time"] or "not planned") in found["Time"]
    assert f"plan configs/{name}.yaml --gpus {row['gpus']} --device {row['device']} " in found["Plan"]
    assert f" configs/{name}.yaml" in found["Start"]
    # The plan is of the file as it is.
    config = load_config(shipped.FOLDER / f"{name}.yaml")
    assert int(row["zero"]) == config.deepspeed.stage
    assert config.evaluation.every is not None


@pytest.mark.parametrize("name", [PAIR, "language/distillm2", "demo/cross_entropy", "demo/vision/taid"])
@pytest.mark.parametrize("folder", ["configs", "my/own"])
def test_a_copy_is_the_same_configuration_without_the_repository(name, folder, tmp_path, monkeypatch):
    kind = KINDS[shipped.command_of(name)]
    there = load_config(shipped.FOLDER / f"{name}.yaml", (), kind).model_dump_json()
    monkeypatch.chdir(tmp_path)
    path, *_ = shipped.copy(name, Path(folder))
    assert path == Path(folder, f"{name}.yaml")
    assert load_config(path, (), kind).model_dump_json() == there.replace("configs/", f"{folder}/")


def test_models_that_a_configuration_names_are_copied_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped.copy("demo/taid", Path("mine"))
    copied = load_config("mine/demo/taid.yaml")
    assert copied.student.tokenizer == copied.teacher.path == "mine/demo/teacher"
    assert Path("mine/demo/teacher/model.safetensors").stat().st_size > 10_000


def test_a_sweep_comes_with_its_runs_and_its_first_sweep():
    needed = [str(path) for path in shipped.needed_by("study/teacher_size")]
    assert {"study/teachers.yaml", "demo/teacher.yaml", "demo/taid.yaml"} <= {*needed}
    assert len(needed) == len({*needed})


def test_nothing_is_overwritten(tmp_path):
    copies = shipped.copy(PAIR, tmp_path)
    assert shipped.copy(PAIR, tmp_path) == copies
    copies[-1].write_text("mine")
    other = tmp_path / "imagenet/resnet34_resnet18/dkd.yaml"
    with pytest.raises(UserError, match="already exists, with other content; choose another place"):
        shipped.copy("imagenet/resnet34_resnet18/dkd", tmp_path)
    assert copies[-1].read_text() == "mine"
    assert not other.exists()


def test_one_file_is_copied_under_its_new_name(tmp_path):
    target = tmp_path / "my.yaml"
    assert shipped.copy("vlm/qwen2_5_vl_7b_3b", target) == [target]
    assert f"vlm-distill train {target} --nproc 8\n" in target.read_text()
    with pytest.raises(UserError, match=r"kd builds on other files \(imagenet/base/recipe.yaml, .*; name a folder"):
        shipped.copy(PAIR, target)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("imagenet/resnet34_resnet18", 5),
        ("configs/vlm/two_teachers.yaml", 1),
        ("two_teachers", 1),
        ("language/", 10),
    ],
)
def test_a_name_may_be_a_folder_a_path_or_a_file_alone(asked, found):
    assert len(shipped.matching(asked)) == found


@pytest.mark.parametrize(
    ("asked", "says"),
    [("vlm/two_teacher", "did you mean vlm/two_teachers?"), ("kd", "did you mean .*/kd or .*/kd or .*/kd?"), ("x", "")],
)
def test_an_unknown_name_is_answered_with_the_nearest(asked, says):
    with pytest.raises(UserError, match=f"configs: no configuration '{asked}'; {says}"):
        shipped.matching(asked)


def test_the_command_lists_prints_and_copies(command, tmp_path):
    code, said, errors = command("configs")
    assert (code, errors) == (0, "")
    for text in ("For vlm-distill train", "For vlm-distill classify", "vlm/two_teachers", "demo/vision/kd"):
        assert text in said
    assert "two_teachers" not in command("configs", "cifar100")[1]

    code, said, errors = command("configs", PAIR)
    assert code == 0
    assert said == Path(f"configs/{PAIR}.yaml").read_text()
    assert errors.startswith("it builds on imagenet/base/recipe.yaml, imagenet/base/resnet34_resnet18.yaml: ")

    code, said, _ = command("configs", "cifar100/vgg13_vgg8", tmp_path)
    assert code == 0
    assert {Path(line).name for line in said.splitlines()} >= {"kd.yaml", "taid.yaml", "recipe.yaml", "vgg13_vgg8.yaml"}
    code, _, errors = command("configs", "cifar100", tmp_path / "one.yaml")
    assert code == 2
    assert "do not go into one file; name a folder" in errors
