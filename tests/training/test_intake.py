"""A run that cannot use its data ends in one line, and what learns nothing changes nothing."""

import json
import re
from types import SimpleNamespace

import chat_templates
import pictures
import pytest
import tiny
import torch
import yaml

from data.errors import UserError
from vision import train as classify
from vision.config import ClassifierConfig
from vision.trainer import Trainer as ClassifierTrainer
from vlm_distill import train
from vlm_distill.config.sections import RunConfig
from vlm_distill.trainer import Trainer
from vlm_distill.training.intake import FirstSamples, SampleTally

EVERY_ROW = tuple(range(24))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.write_teacher(tmp_path_factory.mktemp("intake") / "teacher")


@pytest.fixture
def run(tmp_path, teacher, capsys):
    """Trains in this process; gives the exit code and standard error."""

    def start(text_only=(), broken=(), **changes):
        data = tmp_path / "data" / "data.jsonl"
        if not data.exists():
            tiny.write_data(tmp_path / "data", text_only=text_only, broken=broken)
        plain = tiny.config(tmp_path / "out", data, teacher, training__checkpoint_every=1, **changes)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
        code = train.main([str(tmp_path / "run.yaml")])
        return code, " ".join(capsys.readouterr().err.split())

    return start


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data__max_length": 3}, "too long (24), as in data, line "),
        ({"data__max_length": 3}, "; raise data.max_length"),
        ({"broken": EVERY_ROW}, "not an image (24), as in data, line "),
        ({"data__roots": ["/nowhere"]}, "image outside the roots (24)"),
        ({"data__max_length": 3, "data__workers": 1, "data__packing": True}, "too long (24)"),
        ({"data__max_length": 3, "on_policy": {"fraction": 1.0}, "loss": [{"name": "jsd"}]}, "too long (24)"),
    ],
)
def test_a_run_without_a_usable_sample_does_not_begin(run, tmp_path, settings, says):
    code, told = run(**settings)
    assert code == 2
    assert "data.train: none of the first 24 samples can be used: " in told
    assert says in told
    assert not (tmp_path / "out" / "student").exists()


def test_images_in_another_folder_are_named_with_the_remedy(run, tmp_path):
    tiny.write_data(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    source = {"path": str(tmp_path / "data" / "data.jsonl"), "images": str(tmp_path / "empty")}
    code, told = run(data__train=[source])
    assert code == 2
    assert "image not found (24), as in data, line " in told
    assert f": {tmp_path}/empty/" in told
    assert "; set images of the source to the folder" in told


def test_many_bad_rows_are_told_before_the_first_step_and_counted_after_it(run, tmp_path):
    code, told = run(broken=(0, 5, 9, 13))
    assert code == 0
    assert "warning: 4 of the first 24 samples are left out: not an image (4), as in data, line " in told
    assert told.index("samples are left out") < told.index("step 1/5")
    assert re.search(r"left out \d+\.\d%", told)
    line = metrics(tmp_path / "out")[-1]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert line["left_out"] == summary["left_out"] == pytest.approx(round(line["left_out"] * 40) / 40)
    assert 0 < line["left_out"] < 0.4
    assert f"of 40 samples left out ({line['left_out']:.1%}) over all steps" in told


def test_few_bad_rows_need_no_warning(run):
    code, told = run(broken=(0, 5))
    assert code == 0
    assert "samples are left out:" not in told


def test_a_resumed_run_counts_on(tmp_path, teacher, processes):
    data = tiny.write_data(tmp_path / "data", broken=tuple(range(16)))

    def trainer(limit):
        plain = tiny.config(tmp_path / "out", data, teacher, data__max_bad=limit)
        return Trainer(RunConfig.model_validate(plain), processes)

    trainer(0.9).run(2)
    with pytest.raises(UserError, match=r"of 24 samples left out \(66.7%\), more than 50%") as ended:
        trainer(0.5).run()
    assert "16 samples left out: data: not an image (16)" in str(ended.value)


def test_too_much_left_out_ends_the_run(run, tmp_path):
    code, told = run(broken=tuple(range(18)))
    assert code == 2
    assert "data.max_bad: " in told
    assert "samples left out (75.0%), more than 50%: 18 samples left out: data: not an image (18)" in told
    assert not (tmp_path / "out" / "student").exists()


def test_what_nothing_reads_is_named_once_a_source(run, tmp_path):
    data = tiny.write_data(tmp_path / "data")
    records = [json.loads(line) | {"rating": 5, "score": {"a": 1}} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, told = run()
    assert code == 0
    assert told.count("data: keys rating, score of its records are ignored") == 1


def test_answers_that_cannot_be_compared_are_counted():
    (said,) = FirstSamples(tried=24, apart=30, samples_apart=24).remarks()
    assert said.startswith("30 tokens in 24 of the first 24 samples are learned by cross-entropy alone: ")


@pytest.mark.parametrize(
    ("rows", "left_out", "epoch", "last", "ends"),
    [
        (8, 8, 1000, False, False),  # the first step of many
        (64, 33, 1000, False, True),
        (64, 32, 1000, False, False),
        (24, 13, 24, False, True),  # an epoch
        (8, 8, 1000, True, True),  # the end of a short run
    ],
)
def test_a_few_bad_rows_at_the_beginning_end_no_run(rows, left_out, epoch, last, ends):
    assert SampleTally(rows, left_out).exceeds(0.5, epoch, last=last) is ends


@pytest.mark.parametrize("stage", range(4))
def test_a_step_without_a_sample_changes_neither_weights_nor_optimizer(tmp_path, teacher, processes, stage):
    """Of two rows one cannot be used: with a micro-batch of one, every other step is empty or holds nothing else."""
    data = tiny.write_data(tmp_path / "data", broken=tuple(range(12)))
    changes = {"training__batch_size": 2, "training__micro_batch_size": 1, "training__steps": 8, "data__max_bad": 1.0}
    changes |= {"optimizer__lr": 0.1, "optimizer__weight_decay": 0.5, "deepspeed__stage": stage}
    config = RunConfig.model_validate(tiny.config(tmp_path / "out", data, teacher, **changes))
    trainer = Trainer(config, processes)
    before, moved = states(trainer), {}
    original = trainer.train_step

    def step(one, waited):
        nonlocal before
        found = original(one, waited)
        after = states(trainer)
        moved[one.index + 1] = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        before = after
        return found

    trainer.train_step = step
    trainer.run()
    lines = metrics(tmp_path / "out")
    learnt = {line["step"]: line["supervised_tokens"] > 0 for line in lines}
    assert set(learnt.values()) == {True, False}
    assert moved == learnt
    assert [("loss" in line, "grad_norm" in line) for line in lines] == [(one, one) for one in learnt.values()]
    assert lines[-1]["empty_steps"] == list(learnt.values()).count(False)


def states(trainer):
    """Copies of all weights and of everything that the optimizer keeps."""
    weights = trainer.engine.whole_state(trainer.student).values()
    kept = trainer.engine._engine.optimizer
    inner = getattr(kept, "optimizer", kept)
    moments = [
        value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for state in inner.state.values()
        for value in state.values()
    ]
    return [tensor.clone() for tensor in [*weights, *moments]] if moments else [*(t.clone() for t in weights)]


@pytest.mark.parametrize(
    ("train_parts", "code", "says"),
    [
        (
            ["projector", "decoder"],
            0,
            "a vision encoder, but none of the first 24 samples has an image",
        ),
        (["projector"], 2, "student.train: only projector would train, and none of the first 24 samples has an image"),
    ],
)
def test_a_student_that_sees_and_gets_no_image_is_told_of(run, train_parts, code, says):
    found, told = run(text_only=EVERY_ROW, student={**tiny.settings(), "train": train_parts})
    assert found == code
    assert says in told


def test_a_classifiers_run_without_a_usable_image_does_not_begin(tmp_path, capsys):
    images = pictures.make_images(tmp_path / "images", broken=tuple(range(60)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(pictures.config(tmp_path / "out", images, None)))
    assert classify.main([str(tmp_path / "run.yaml")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "data.train: none of the first 60 samples can be used: not an image (60), as in images, line " in told
    assert "vlm-distill inspect" not in told


def test_a_classifiers_empty_step_changes_nothing(tmp_path, processes):
    images = pictures.make_images(tmp_path / "images", broken=tuple(range(30)))
    changes = {"training__batch_size": 2, "training__micro_batch_size": 2, "training__steps": 12, "training__ema": 0.5}
    config = pictures.config(tmp_path / "out", images, None, **changes, data__max_bad=0.9)
    trainer = ClassifierTrainer(ClassifierConfig.model_validate(config), processes)
    moved, original = {}, trainer.train_step

    def step(one, waited):
        before = [p.detach().clone() for model in (trainer.student, trainer.average.module) for p in model.parameters()]
        found = original(one, waited)
        after = [p for model in (trainer.student, trainer.average.module) for p in model.parameters()]
        moved[one.index + 1] = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return found

    trainer.train_step = step
    trainer.run()
    learnt = {line["step"]: line["samples"] > 0 for line in metrics(tmp_path / "out")}
    assert set(learnt.values()) == {True, False}
    assert moved == learnt


@pytest.mark.parametrize(("template", "turns", "said"), [("block", 1, 0), ("block", 2, 1), ("chatml", 2, 0)])
def test_answers_that_change_later_are_named_where_rows_have_several(template, turns, said):
    talk = chat_templates.conversation([("user", "What?"), ("assistant", "Red.")] * turns)
    run = object.__new__(Trainer)
    run.config = SimpleNamespace(data=SimpleNamespace(turns="together"))
    run.student = SimpleNamespace(processor=chat_templates.processor(template))
    run.dataset = SimpleNamespace(mixture=SimpleNamespace(samples_of=lambda step: [(0, 0)], sources=[[talk]]))
    run.steps = 3
    assert len(run.remarks_on(FirstSamples(tried=1, images=1))) == said
