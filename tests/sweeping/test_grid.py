"""A sweep's file and words become runs: settings, seeds, folders, overrides; mistakes are one line."""

from pathlib import Path

import pytest
import yaml
from run_files import CLASSIFIER, write

from data.errors import UserError
from vlm_distill.config.file import parse_override
from vlm_distill.sweeping.grid import read_sweep, shell_line
from vlm_distill.sweeping.words import label, override, read_word

ROOT = Path(__file__).parents[2]
LOSSES = {"ce": {"teacher": None, "loss": [{"name": "cross_entropy"}]}, "taid": {}, "kl": {"loss.0.name": "forward_kl"}}


@pytest.fixture
def make(tmp_path):
    """Writes a sweep over a good configuration; gives its file."""
    write(tmp_path, {"loss": [{"name": "taid"}]})

    def make(name="sweep.yaml", **changes):
        plain = {"config": "run.yaml", "output": str(tmp_path / "runs"), "axes": {"loss": LOSSES}} | changes
        path = tmp_path / name
        path.write_text(yaml.safe_dump(plain, sort_keys=False))
        return path

    return make


def names(sweep):
    return [run.name for run in sweep.runs]


def test_runs_are_in_the_order_of_seeds(make, tmp_path):
    sweep = read_sweep(make(axes={"loss": LOSSES, "training.seed": [3, 4]}))
    assert names(sweep) == ["ce/seed3", "taid/seed3", "kl/seed3", "ce/seed4", "taid/seed4", "kl/seed4"]
    last = sweep.runs[-1]
    assert last.folder == tmp_path / "runs/kl/seed4"
    assert last.settings["loss"][0]["name"] == "forward_kl"
    assert last.settings["training"]["seed"] == 4
    assert last.settings["output"] == str(last.folder)
    assert sweep.baseline == ("loss", "ce")


def test_later_axes_override_earlier_ones_and_words_override_all(make):
    path = make(overrides={"training.steps": 1}, axes={"first": {"a": {"training.steps": 2}}, "training.steps": [3, 4]})
    assert [run.settings["training"]["steps"] for run in read_sweep(path).runs] == [3, 4]
    assert names(read_sweep(path)) == ["a,steps=3/seed0", "a,steps=4/seed0"]
    (run,) = read_sweep(path, ["training.steps=5"]).runs
    assert run.settings["training"]["steps"] == 5


def test_a_setting_may_have_a_configuration_of_its_own(make, tmp_path):
    write(tmp_path, {"training": {"steps": 77, "batch_size": 64}}, name="other.yaml")
    first, second = read_sweep(make(axes={"kind": {"a": {}, "b": {"config": "other.yaml"}}})).runs
    assert (first.settings["training"]["steps"], second.settings["training"]["steps"]) == (10, 77)


def test_equal_configurations_are_run_once(make):
    teachers = {name: {"teacher.path": name} for name in ("small", "big")}
    sweep = read_sweep(make(axes={"teacher": teachers, "loss": LOSSES}, baseline="ce"))
    assert len(sweep.runs) == 6
    assert len(sweep.distinct) == 5
    shared = [run for run in sweep.runs if run.setting["loss"] == "ce"]
    assert {run.name for run in shared} == {"small,ce/seed0"}
    assert sweep.baseline == ("loss", "ce")


def test_words_choose_settings_and_give_values(make, tmp_path):
    path = make(axes={"loss": LOSSES, "training.seed": [0]})
    words = ["loss=taid,kl", "training.seed=5,6", "optimizer.lr=1e-3,2e-3", f"output={tmp_path / 'other'}"]
    sweep = read_sweep(path, words)
    assert names(sweep)[:2] == ["taid,lr=0.001/seed5", "taid,lr=0.002/seed5"]
    assert len(sweep.runs) == 8
    assert sweep.runs[0].folder.is_relative_to(tmp_path / "other")
    assert sweep.runs[1].numbers == {"optimizer.lr": 0.002}


def test_a_plain_configuration_is_swept_by_words(make, tmp_path):
    make()
    sweep = read_sweep(tmp_path / "run.yaml", ["training.seed=0,1", "loss=[{name: taid}],[{name: kd}]"])
    assert names(sweep) == [f"loss={loss}/seed{seed}" for seed in (0, 1) for loss in ("taid", "kd")]
    assert sweep.baseline == ("loss", "loss=taid")
    with pytest.raises(UserError, match="nothing to compare; name an axis"):
        read_sweep(tmp_path / "run.yaml")


def test_seeds_alone_are_one_setting(make, tmp_path):
    make()
    sweep = read_sweep(tmp_path / "run.yaml", ["training.seed=0,1"])
    assert names(sweep) == ["run/seed0", "run/seed1"]
    assert sweep.baseline is None


def test_a_limit_is_a_smaller_sweep_in_a_folder_of_its_own(make, tmp_path):
    small = {"axes": {"loss": ["kl"], "training.seed": [9]}, "overrides": {"training.steps": 3}}
    path = make(axes={"loss": LOSSES, "training.seed": [0, 1]}, limits={"small": small})
    (run,) = read_sweep(path, limit="small").runs
    assert run.folder == tmp_path / "runs-small/kl/seed9"
    assert run.settings["training"]["steps"] == 3
    with pytest.raises(UserError, match="no limit 'big'; there are small"):
        read_sweep(path, limit="big")


def test_classifiers_are_recognised(tmp_path):
    path = write(tmp_path, good=CLASSIFIER, name="kd.yaml")
    sweep = read_sweep(path, ["training.seed=0,1"])
    assert {run.command for run in sweep.runs} == {"classify"}
    assert shell_line(sweep.runs[1].words("classify", 2)) == (
        f"vlm-distill classify {path} training.seed=1 output=runs/kd-sweep/kd/seed1 --nproc 2"
    )


@pytest.mark.parametrize(
    ("changes", "words", "says"),
    [
        ({"axis": {}}, [], "axis: unknown key; did you mean 'axes'?"),
        ({"axes": {"loss": {"a": {"training.stepz": 1}}}}, [], "sweep.yaml: in the setting a: "),
        ({"axes": {"loss": {"a": {"training.stepz": 1}}}}, [], "training.stepz: unknown key"),
        ({"axes": {"loss": {"a b": {}, "a/b": {}}}}, [], "axis loss: a_b is given twice"),
        ({"axes": {"loss": {}}}, [], "axes.loss"),
        ({"config": "none.yaml"}, [], "none.yaml: no such configuration file"),
        ({"baseline": "none"}, [], "baseline: no setting 'none'; there are ce, taid, kl"),
        ({"first": ["none.yaml"]}, [], "none.yaml: no such file"),
        ({"first": ["sweep.yaml"]}, [], "sweeps name each other in a circle"),
        ({"limits": {"small": {"axes": {"los": ["a"]}}}}, [], "limits.small.axes.los: there is no such axis"),
        ({}, ["loss=tiad"], "loss=: no setting 'tiad'; there are ce, taid, kl"),
        ({}, ["training.steps"], "'training.steps': write it as section.key=value"),
    ],
)
def test_mistakes_are_one_line(make, changes, words, says):
    limit = "small" if "limits" in changes else None
    with pytest.raises(UserError) as error:
        read_sweep(make(**changes), words, limit)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_that_the_ranks_cannot_share_is_refused(make):
    with pytest.raises(UserError, match="9 is not divisible"):
        read_sweep(make(), ["training.batch_size=9"], nproc=2)


@pytest.mark.parametrize(
    ("word", "key", "values"),
    [
        ("training.seed=0,1", "training.seed", [0, 1]),
        ("a.b=x", "a.b", ["x"]),
        ("loss=[{name: kd, t: 1}],[{name: taid}]", "loss", [[{"name": "kd", "t": 1}], [{"name": "taid"}]]),
        ("path='a,b',c", "path", ["a,b", "c"]),
        ("loss[0].weight=1,2", "loss.0.weight", [1, 2]),
    ],
)
def test_commas_outside_brackets_and_quotes_separate_values(word, key, values):
    assert read_word(word) == (key, values)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, 1e-05, 1.5, "x", "runs/a b", "1e-3", "yes", "null", "a: b", "[x", "a,b", "${output}/c", "ü",
     "12:30", "- x", "", "# no", {"a": [1, {"b": None}]}, [{"name": "kd", "weight": 0.1}], "two\nlines", "'quoted'"],
)  # fmt: skip
def test_a_value_survives_the_command_line(value):
    assert parse_override(override("a.b", value)) == ("a.b", value)


def test_labels_are_short_and_names_of_folders():
    assert label([{"name": "kd", "weight": 2}, {"name": "cross_entropy"}]) == "kd+cross_entropy"
    assert label(0.001) == "0.001"
    assert "/" not in label("a/b c")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/study").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_are_sweeps(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = path.relative_to(ROOT)
    sweep = read_sweep(file, ["training.seed=0"])
    assert len({run.folder for run in sweep.runs}) == len(sweep.distinct)
    for name in yaml.safe_load(path.read_text()).get("limits", {}):
        assert read_sweep(file, ["training.seed=0"], name).output != sweep.output
