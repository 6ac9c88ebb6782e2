"""Teachers that see something else than their students: what they are shown, and that it teaches the same tokens."""

import json

import pytest
import tiny

from data.errors import UserError
from vlm_distill.caching.fill import fill
from vlm_distill.config.sections import RunConfig
from vlm_distill.inspection import Inspection
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer

HINT = {"system": "say it", "question": "{question} say {answer}", "images": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with a question, and a teacher that has learnt to say what the question tells it to say."""
    folder = tmp_path_factory.mktemp("view")
    tiny.write_data(folder / "data", text_only=(3, 4))
    rows = []
    for colour in tiny.COLOURS:
        talk = [{"from": "human", "value": f"what color is it? say {colour}"}, {"from": "gpt", "value": colour}]
        rows.append(json.dumps({"conversations": talk}))
    (folder / "hints.jsonl").write_text("\n".join(rows))
    tiny.write_teacher(folder / "teacher")
    plain = tiny.config(folder / "taught", folder / "hints.jsonl", None, training__steps=60, optimizer__lr=3e-2)
    Trainer(RunConfig.model_validate(plain), Processes("cpu")).run()
    return folder


def trainer(folder, name, teacher="taught/student", view=None, **changes):
    plain = tiny.config(folder / name, folder / "data" / "data.jsonl", folder / teacher, **changes)
    if view is not None:
        plain["teacher"]["view"] = view
    return Trainer(RunConfig.model_validate(plain), Processes("cpu"))


def teacher_texts(trainer, batch):
    decode = trainer.student.processor.tokenizer.decode
    return [
        decode([i for i in row if i != 0], clean_up_tokenization_spaces=False)
        for row in batch.teacher.inputs["input_ids"].tolist()
    ]


def test_a_teacher_that_is_told_the_answer_has_a_lower_loss_on_it(folder):
    plain, told = (trainer(folder, name, view=view) for name, view in (("plain", None), ("told", HINT)))
    (loss, _), (lower, _) = (run._teacher_losses(run.loss_teacher)[""] for run in (plain, told))
    assert lower < 0.5 * loss


@pytest.mark.parametrize("view", [HINT, {"images": {"blur": 3}}, {"question": "{question} {answer}"}])
def test_both_predict_the_same_tokens(folder, view):
    run = trainer(folder, "aligned", "teacher", view=view)
    batch = run.dataset[0].batches[0]
    assert batch.teacher.inputs["input_ids"].flatten()[batch.teacher.positions + 1].equal(batch.targets)
    assert batch.distilled.all()


def test_drawn_answers_are_judged_by_a_teacher_that_knows_the_right_one(folder):
    loss = [{"name": "reverse_kl"}]
    drawing = {"fraction": 1.0, "max_new_tokens": 4}
    run = trainer(folder, "drawn", view=HINT, loss=loss, on_policy=drawing, training__steps=2)
    step = run.prepare_step(run.dataset[0])
    for batch in step.batches:
        assert batch.teacher.inputs["input_ids"].flatten()[batch.teacher.positions + 1].equal(batch.targets)
        assert "pixel_values" not in batch.teacher.inputs or not batch.teacher.images.numel()
    run.run()
    # Without a view, the two models receive the same rows.
    plain = trainer(folder, "plainly_drawn", loss=loss, on_policy=drawing, training__steps=2)
    other = plain.prepare_step(plain.dataset[0]).batches[0]
    assert other.teacher.tokens == other.student.tokens != step.batches[0].teacher.tokens


def test_a_cache_is_of_one_view(folder):
    live = trainer(folder, "live", "teacher", HINT, training__steps=3)
    live.run()
    cached = tiny.config(folder / "cached", folder / "data" / "data.jsonl", folder / "teacher", training__steps=3)
    cached["teacher"] |= {"view": HINT, "cache": {"folder": str(folder / "cache")}}
    fill(RunConfig.model_validate(cached), Processes("cpu"))
    run = Trainer(RunConfig.model_validate(cached), Processes("cpu"))
    run.run()
    losses = [
        [
            line["loss"]
            for line in map(json.loads, (r.folder / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for r in (live, run)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for view in (None, {**HINT, "system": "no"}):
        cached["teacher"]["view"] = view
        with pytest.raises(UserError, match="view"):
            Trainer(RunConfig.model_validate(cached), Processes("cpu"))


def test_inspect_shows_what_the_teacher_sees(folder):
    plain = tiny.config(folder / "shown", folder / "data" / "data.jsonl", folder / "teacher")
    plain["teacher"]["view"] = HINT
    (line,) = Inspection(RunConfig.model_validate(plain)).lines(1)
    assert "say it" in line["teacher"]["text"]
    assert line["teacher"]["images"] == 0 < line["student"]["images"]
    assert line["teacher"]["supervised"] == line["student"]["supervised"]


def test_a_frozen_encoder_runs_for_each_model_where_the_teacher_sees_worse_images(folder):
    frozen = {"from_teacher": {"layers": 2}, "train": ["projector", "decoder"]}
    same = trainer(folder, "seen_once", "teacher", HINT | {"images": "same"}, student=frozen)
    worse = trainer(folder, "seen_worse", "teacher", {"images": {"blur": 4}}, student=frozen)
    assert (same.shared_vision, worse.shared_vision) == (True, False)


@pytest.mark.parametrize(
    ("view", "loss", "match"),
    [
        ({"question": "say {answer}"}, [{"name": "forward_kl"}], "question"),
        ({"question": "{question} {question}"}, [{"name": "forward_kl"}], "once"),
        ({"images": "same"}, [{"name": "forward_kl"}], "changes nothing"),
        ({"images": {"blur": 0}}, [{"name": "forward_kl"}], "blur"),
        ({"images": "none"}, [{"name": "vision_features"}], "teacher.view.images is none"),
        ({"images": "none"}, [{"name": "forward_kl", "on": "images"}], "teacher.view.images is none"),
    ],
)
def test_a_view_that_cannot_work_is_refused(folder, view, loss, match):
    with pytest.raises((ValueError, UserError), match=match):
        trainer(folder, "refused", "teacher", view=view, loss=loss)
