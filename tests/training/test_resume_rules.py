"""A run that is started again goes on as it began, says what else it does differently, or says why it does not."""

import hashlib
import json
import shutil
import typing

import pictures
import pytest
import tiny
import yaml
from pydantic import BaseModel

import vision.trainer
from data.errors import UserError
from vision.config import ClassifierConfig
from vlm_distill.config.sections import RunConfig
from vlm_distill.export import export_student
from vlm_distill.trainer import train
from vlm_distill.training import resume
from vlm_distill.training.resume import Rule


def leaves(kind, prefix=""):
    """Every dotted key of a configuration, list items left out."""
    for name, about in kind.model_fields.items():
        sections = list(sections_in(about.annotation))
        for section in sections:
            yield from leaves(section, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}"


def sections_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from sections_in(argument)


@pytest.mark.parametrize("kind", [RunConfig, ClassifierConfig])
def test_every_key_of_a_configuration_has_a_rule(kind):
    missing = [key for key in leaves(kind) if resume.rule_of(key) is None]
    assert not missing, f"add them to RULES in vlm_distill/training/resume.py: {missing}"


def test_every_rule_is_of_a_key_that_there_is():
    keys = [*leaves(RunConfig), *leaves(ClassifierConfig)]
    sections = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, 5)}
    inside = ("decoder.name", "vision_encoder.name")  # of a mapping that is no section
    assert not [key for key in resume.RULES if key not in sections and not key.endswith(inside)]


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("loss.0.weight", Rule.FIXED),
        ("student.decoder.config.hidden_size", Rule.FIXED),
        ("student.decoder.name", Rule.FILES),
        ("data.train.12.path", Rule.ROWS),
        ("data.train.12.weight", Rule.FIXED),
        ("teacher.server.url", Rule.FREE),
        ("teacher.server.top_logprobs", Rule.FIXED),
        ("optimizer.lr", Rule.STEERS),
        ("deepspeed.zero_optimization.stage3_max_live_parameters", Rule.FREE),
    ],
)
def test_the_rule_of_a_key_is_its_own_or_its_sections(key, rule):
    assert resume.rule_of(key) is rule


@pytest.fixture(scope="module")
def material(tmp_path_factory, processes):
    """A folder with data, a teacher and a run ``stopped`` after four of six steps."""
    folder = tmp_path_factory.mktemp("rules")
    tiny.write_data(folder / "data", text_only=(3,))
    tiny.write_teacher(folder / "teacher")
    train(configuration(folder, "stopped"), processes, until=4)
    return folder


def configuration(folder, name, **changes):
    settings = {"training__steps": 6, "training__checkpoint_every": 2, "loss": [{"name": "taid"}], **changes}
    plain = tiny.config(folder / name, folder / "data" / "data.jsonl", folder / "teacher", **settings)
    return RunConfig.model_validate(plain)


@pytest.fixture
def stopped(material, tmp_path):
    """A copy of all of it, which a test may spoil."""
    shutil.copytree(material, tmp_path / "copy")
    return tmp_path / "copy"


def content(folder):
    """What every file of a run is, but for what only says that it is open."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


REFUSED = {
    "another loss": ({"loss": [{"name": "forward_kl"}]}, "loss.0.name: taid → forward_kl"),
    "one loss more": ({"loss": [{"name": "taid"}, {"name": "cross_entropy"}]}, "loss.1.name: none → cross_entropy"),
    "a loss's parameter": ({"loss": [{"name": "taid", "t_start": 0.3}]}, "loss.0.t_start: none → 0.3"),
    "a weight": ({"loss": [{"name": "taid", "weight": 0.5}]}, "loss.0.weight: 1.0 → 0.5"),
    "seed": ({"training__seed": 3}, "training.seed: 0 → 3"),
    "batch size": ({"training__batch_size": 4}, "training.batch_size: 8 → 4"),
    "precision": ({"training__dtype": "bf16"}, "training.dtype: fp32 → bf16"),
    "a wider student": ({"student": tiny.settings(width=32)}, "student.vision_encoder.config.embed_dim: 16 → 32"),
    "a deeper student": ({"student": tiny.settings(layers=3)}, "student.decoder.config.num_hidden_layers: 2 → 3"),
    "length": ({"data__max_length": 32}, "data.max_length: 64 → 32"),
    "order": ({"data__length_window": 2}, "data.length_window: 0 → 2"),
    "decay": ({"optimizer__weight_decay": 0.5}, "optimizer.weight_decay: 0.01 → 0.5"),
    "schedule": ({"optimizer__schedule": "constant"}, "optimizer.schedule: cosine → constant"),
    "warm-up": ({"optimizer__warmup": 3}, "optimizer.warmup: 0.2 → 3.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_make_it_another_run_is_refused_before_a_model_is_loaded(material, processes, monkeypatch, case):
    changes, words = REFUSED[case]
    before = content(material / "stopped")
    monkeypatch.setattr("vlm_distill.run.load_teacher", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError) as caught:
        train(configuration(material, "stopped", **changes), processes)
    told = str(caught.value)
    assert words in told
    assert "choose another output" in told
    assert f"student.path={material / 'stopped' / 'student'}" in told
    assert content(material / "stopped") == before


def edit_a_row(folder):
    path = folder / "data" / "data.jsonl"
    path.write_text(path.read_text().replace('"value": "green"', '"value": "black"', 1))


def add_a_row(folder):
    path = folder / "data" / "data.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")


def swap_rows(folder):
    path = folder / "data" / "data.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")


def paint_an_image(folder):
    shutil.copy(folder / "data" / "1.png", folder / "data" / "0.png")


def lose_an_image(folder):
    (folder / "data" / "0.png").unlink()


def train_the_teacher_on(folder):
    path = folder / "teacher" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit_a_row, "data.train: data: other content in its 24 rows"),
        (add_a_row, "data.train: data: 24 rows → 25"),
        (swap_rows, "data.train: data: other content in its 24 rows"),
        (paint_an_image, "data.train: data: other content in its 24 rows"),
        (lose_an_image, "data.train: data: image not found: "),
        (train_the_teacher_on, "teacher.path: other weights in "),
    ],
)
def test_the_same_words_for_other_files_are_refused(stopped, processes, change, words):
    config = configuration(stopped, "stopped")
    # The copy lies elsewhere, which by itself is no difference.
    change(stopped)
    with pytest.raises(UserError, match="holds a run with other settings") as caught:
        train(config, processes)
    assert words in str(caught.value)


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def test_what_may_change_is_told_and_kept_in_the_record(stopped, processes, capfd):
    changes = {"training__steps": 7, "optimizer__lr": 0.02, "data__workers": 1, "deepspeed__stage": 1}
    train(configuration(stopped, "stopped", **changes), processes)
    told = " ".join(capfd.readouterr().err.split())
    said = "optimizer.lr 0.01 → 0.02, training.steps 6 → 7, deepspeed.stage 0 → 1"
    assert f"resumed after step 4 with data.workers 0 → 1, {said}" in told
    assert "optimizer.schedule: cosine now spans 7 steps instead of 6" in told
    out = stopped / "stopped"
    assert [line["step"] for line in lines(out)] == list(range(1, 8))
    assert (
        (out / "config.yaml").read_text().startswith("# after step 4: optimizer.lr 0.01 → 0.02, training.steps 6 → 7\n")
    )
    assert yaml.safe_load((out / "config.yaml").read_text())["optimizer"]["lr"] == 0.02
    export_student(out, stopped / "exported")
    card = (stopped / "exported" / "README.md").read_text()
    assert "| changed during training | after step 4: optimizer.lr 0.01 → 0.02, training.steps 6 → 7 |" in card
    # And of it, in turn, the next one knows.
    train(configuration(stopped, "stopped", **changes | {"training__steps": 8}), processes)
    assert len(resume.Record.read(out).comments()) == 2


def test_a_finished_run_does_nothing_until_it_is_to_be_longer(stopped, processes, capfd):
    out, constant = stopped / "run", {"optimizer__schedule": "constant", "optimizer__warmup": 0}
    train(configuration(stopped, "run", **constant), processes)
    before = content(out)
    train(configuration(stopped, "run", **constant), processes)
    train(configuration(stopped, "run", data__workers=1, **constant), processes)
    assert capfd.readouterr().err.count("is already finished, after 6 steps; nothing was changed") == 2
    assert content(out) == before
    with pytest.raises(UserError, match="4 steps are fewer than the 6 of "):
        train(configuration(stopped, "run", training__steps=4, **constant), processes)
    with pytest.raises(UserError, match=r"training.seed: 0 → 1"):
        train(configuration(stopped, "run", training__seed=1, **constant), processes)
    with pytest.raises(UserError, match=r"training.resume=true to continue it"):
        train(configuration(stopped, "run", training__resume=False, **constant), processes)
    assert content(out) == before
    train(configuration(stopped, "run", training__steps=8, **constant), processes, until=7)
    # Its student is still the one of six steps: what is exported is the checkpoint's.
    export_student(out, stopped / "longer")
    assert "steps 8" in (stopped / "longer" / "README.md").read_text()
    train(configuration(stopped, "run", training__steps=8, **constant), processes)
    assert json.loads((out / "summary.json").read_text())["steps"] == 8
    assert [line["step"] for line in lines(out)] == list(range(1, 9))
    # A constant schedule is the same plan at any length.
    train(configuration(stopped, "straight", training__steps=8, **constant), processes)
    assert [line["lr"] for line in lines(out)] == [line["lr"] for line in lines(stopped / "straight")]


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(stopped, processes, capfd):
    train(configuration(stopped, "stopped"), processes)
    shutil.rmtree(stopped / "stopped" / "checkpoints")
    train(configuration(stopped, "stopped"), processes)
    assert "is already finished" in capfd.readouterr().err
    with pytest.raises(UserError, match="whose checkpoints are gone"):
        train(configuration(stopped, "stopped", training__steps=9), processes)


@pytest.mark.parametrize("text", ["", "{"])
def test_a_run_whose_summary_is_cut_off_is_not_finished(stopped, processes, text):
    train(configuration(stopped, "stopped"), processes)
    (stopped / "stopped" / "summary.json").write_text(text)
    train(configuration(stopped, "stopped"), processes)
    assert json.loads((stopped / "stopped" / "summary.json").read_text())["steps"] == 6


def test_a_file_in_the_place_of_checkpoints_is_named_before_models_are_loaded(stopped, processes, monkeypatch):
    (stopped / "new").mkdir()
    (stopped / "new" / "checkpoints").write_text("")
    monkeypatch.setattr("vlm_distill.run.load_teacher", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="checkpoints is a file, where checkpoints need a folder"):
        train(configuration(stopped, "new"), processes)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_gone_on_from(stopped, processes, capfd):
    out = stopped / "stopped"
    path = out / "checkpoints" / "step_4" / "engine" / "mp_rank_00_model_states.pt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    train(configuration(stopped, "stopped"), processes)
    told = " ".join(capfd.readouterr().err.split())
    assert "step_4 is damaged and set aside as step_4.damaged" in told
    assert "mp_rank_00_model_states.pt: its content has changed" in told
    assert "resumed after step 2" in told
    assert [line["step"] for line in lines(out)] == list(range(1, 7))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_4", "step_4.damaged", "step_6"]


def test_export_of_an_unfinished_run_takes_the_newest_whole_checkpoint(stopped, capfd):
    out = stopped / "stopped"
    (out / "checkpoints" / "step_4" / "run.json").unlink()
    export_student(out, stopped / "exported")
    assert "step_4 is damaged" in capfd.readouterr().err
    shutil.rmtree(out / "checkpoints" / "step_2" / "engine")
    with pytest.raises(UserError, match="no checkpoint is intact"):
        export_student(out, stopped / "again")


def test_a_finished_student_that_is_damaged_is_not_exported(stopped, processes):
    out = stopped / "stopped"
    train(configuration(stopped, "stopped"), processes)
    path = out / "student" / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="delete that folder and start the run again"):
        export_student(out, stopped / "exported")
    shutil.rmtree(out / "student")
    train(configuration(stopped, "stopped"), processes)
    assert path.read_bytes() == good


@pytest.mark.parametrize("name", ["plan.json", "metrics.jsonl", "problems.jsonl"])
def test_what_a_run_reads_back_may_be_cut_off(stopped, processes, name):
    path = stopped / "stopped" / name
    path.write_text('{"kind": "train", "st')
    train(configuration(stopped, "stopped"), processes)
    assert json.loads((stopped / "stopped" / "summary.json").read_text())["steps"] == 6


@pytest.mark.parametrize("name", ["metrics.jsonl", "problems.jsonl"])
@pytest.mark.parametrize("line", ["[1, 2]", '{"kind": "tra', '{"kind": "train"}'])
def test_a_damaged_line_of_a_log_is_named(stopped, processes, name, line):
    (stopped / "stopped" / name).write_text(f"{line}\n")
    with pytest.raises(UserError, match=rf"{name}, line 1: "):
        train(configuration(stopped, "stopped"), processes)


def test_a_configuration_of_an_earlier_version_lacks_keys_that_have_defaults(stopped):
    config = configuration(stopped, "stopped")
    new = resume.Record.of(config)
    old = resume.Record.read(stopped / "stopped")
    del old.configuration["training"]["trackers"], old.configuration["optimizer"]["min_lr_ratio"]
    assert resume.compare(old, config, new)[0] == []
    old.configuration["training"]["of_old"] = 1  # and may have one that is gone
    assert "training.of_old: 1 → none" in resume.compare(old, config, new)[0]


# Classification.


def classifier(folder, name, **changes):
    held_out = [{"path": str(folder / "images"), "name": "held_out"}]
    plain = pictures.config(folder / name, folder / "images", None, data__eval=held_out, **changes)
    plain["training"] |= {"checkpoint_every": 2}
    return ClassifierConfig.model_validate(plain)


def test_a_finished_student_that_is_damaged_is_written_anew(stopped, processes, capfd):
    out = stopped / "stopped"
    train(configuration(stopped, "stopped"), processes)
    path = out / "student" / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    train(configuration(stopped, "stopped"), processes)
    assert "the finished student is damaged and will be rewritten" in " ".join(capfd.readouterr().err.split())
    assert path.read_bytes() == good
    path.unlink()
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(UserError, match=r"model.safetensors: missing; no checkpoint is left to rewrite"):
        train(configuration(stopped, "stopped"), processes)


def test_a_warm_up_that_is_a_share_of_a_longer_run_is_told(stopped, processes, capfd):
    constant = {"optimizer__schedule": "constant", "optimizer__warmup": 0.5}
    train(configuration(stopped, "run", training__steps=4, **constant), processes)
    train(configuration(stopped, "run", training__steps=20, **constant), processes, until=5)
    told = " ".join(capfd.readouterr().err.split())
    assert "optimizer.warmup: is now a share of 20 steps instead of 4: the learning rate continues at 0.005" in told


def test_beside_learning_rates_of_parts_the_others_stay(stopped):
    parts = {"optimizer__part_lr": {"projector": 0.02}}
    old = resume.Record.of(configuration(stopped, "stopped", **parts))
    changed = configuration(stopped, "stopped", optimizer__lr=0.02, **parts)
    refused, _ = resume.compare(old, changed, resume.Record.of(changed))
    assert refused == ["optimizer.lr: 0.01 → 0.02"]


@pytest.fixture(scope="module")
def classified(tmp_path_factory, processes):
    folder = tmp_path_factory.mktemp("classified")
    pictures.make_images(folder / "images")
    vision.trainer.train(classifier(folder, "run"), processes, until=2)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": [{"name": "cross_entropy", "label_smoothing": 0.1}]}, "loss.0.label_smoothing: none → 0.1"),
        ({"student": pictures.vit(width=32)}, "student.config.embed_dim: 16 → 32"),
        ({"optimizer": {"name": "sgd", "lr": 0.05}}, "optimizer.name: momentum → sgd"),
        ({"training": {"steps": 5, "batch_size": 8, "device": "cpu"}}, "training.batch_size: 16 → 8"),
        ({"training__ema": 0.9}, "training.ema: none → 0.9"),
    ],
)
def test_a_classifiers_run_is_refused_in_the_same_way(classified, processes, changes, words):
    with pytest.raises(UserError, match="holds a run with other settings") as caught:
        vision.trainer.train(classifier(classified, "run", **changes), processes)
    assert words in str(caught.value)


def test_a_classifiers_data_are_compared_and_its_end_is_known(classified, processes, tmp_path, capfd):
    shutil.copytree(classified, tmp_path / "copy")
    pictures.make_images(tmp_path / "others", seed=1)
    folder = tmp_path / "copy"
    others = [{"path": str(tmp_path / "others"), "name": "images"}]
    with pytest.raises(UserError, match="images: other content in its 60 rows"):
        vision.trainer.train(classifier(folder, "run", data={"train": others, "workers": 0}), processes)
    changes = {"optimizer": {"name": "momentum", "lr": 0.1}}
    vision.trainer.train(classifier(folder, "run", **changes), processes)
    told = " ".join(capfd.readouterr().err.split())
    assert "resumed after step 2 with" in told
    assert "optimizer.lr 0.05 → 0.1" in told
    before = content(folder / "run")
    vision.trainer.train(classifier(folder, "run", **changes), processes)
    assert "is already finished, after 5 steps" in capfd.readouterr().err
    assert content(folder / "run") == before
