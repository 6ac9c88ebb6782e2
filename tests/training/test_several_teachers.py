"""Several teachers in one run: each teaches its own samples as it would alone, or several teach the same ones."""

import json

import pytest
import tiny
import torch
from scoring_server import serving

from data.errors import UserError
from vlm_distill.caching.fill import fill
from vlm_distill.config.sections import RunConfig
from vlm_distill.inspection import Inspection
from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.planning import plan
from vlm_distill.reporting.report import write_report
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer

KL = [{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.5}]
BOTH = {"big": 2.0, "other": 1.0}
WEIGHED = {"fraction": 0.5, "visual_advantage": {}}
ADAPTIVE = {"name": "skew_forward_kl", "mean": "sequences", "adaptive": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    tiny.write_data(folder / "one", rows=12, text_only=(3, 4))
    tiny.write_data(folder / "two", rows=8, text_only=tuple(range(8)))
    tiny.write_teacher(folder / "big")
    tiny.write_llava(folder / "other", layers=3)
    tiny.write_student(folder / "student")
    return folder


def config(folder, name, taught, teachers=("big", "other"), student="student", **changes):
    """A run; ``taught`` are sources with their teachers, and how these are combined."""
    changes = {"loss": KL, "training__steps": 1, "training__batch_size": 20} | changes
    plain = tiny.config(folder / name, folder / "one" / "data.jsonl", folder / "big", **changes)
    plain["student"] = {"path": str(folder / student)}
    sources = [{"path": str(folder / source / "data.jsonl"), "name": source, **more} for source, more in taught.items()]
    plain["data"]["train"] = sources
    if teachers is not None:
        del plain["teacher"]
        plain["teachers"] = {name: {"path": str(folder / name)} for name in teachers}
    return plain


def write_pieces(folder):
    """Two teachers, the first with the tokenizer of their student ``learner``, the second with another."""
    tiny.write_pieces_teacher(folder / "unlike")
    torch.manual_seed(3)
    for name, layers in (("like", 3), ("learner", 2)):
        model = build_vlm(tiny.settings(layers=layers), tokenizer=tiny.pieces_tokenizer("student"))
        model.save_pretrained(folder / name)


def metrics(plain):
    run = Trainer(RunConfig.model_validate(plain), Processes("cpu"))
    run.run()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def alone(folder, source, teacher, kind="alone", **changes):
    """The first step of a run with one teacher and one source, in a folder of its kind."""
    plain = config(folder, f"{source}_{teacher}_{kind}", {source: {}}, None, **changes)
    plain["teacher"] = {"path": str(folder / teacher)}
    return metrics(plain)[0]


def test_each_teaches_as_it_does_alone(folder):
    apart = {"one": {"teacher": "big"}, "two": {"teacher": "other"}}
    (found,) = metrics(config(folder, "apart", apart))
    size = {"training__batch_size": 12}, {"training__batch_size": 8}
    one, two = (alone(folder, *who, **size[i]) for i, who in enumerate((("one", "big"), ("two", "other"))))
    assert found["teacher/big/forward_kl"] == pytest.approx(one["forward_kl/loss"], rel=1e-5)
    assert found["teacher/other/forward_kl"] == pytest.approx(two["forward_kl/loss"], rel=1e-5)
    tokens = one["supervised_tokens"], two["supervised_tokens"]
    assert found["teacher/big/share"] == pytest.approx(tokens[0] / sum(tokens))
    for key in ("forward_kl/loss", "cross_entropy/loss"):
        mean = (tokens[0] * one[key] + tokens[1] * two[key]) / sum(tokens)
        assert found[key] == pytest.approx(mean, rel=1e-5)


def test_the_losses_of_several_are_weighted(folder):
    (found,) = metrics(config(folder, "weighted", {"one": {"teacher": BOTH}}, training__batch_size=12))
    one, other = (alone(folder, "one", name, training__batch_size=12) for name in ("big", "other"))
    mean = (2 * one["forward_kl/loss"] + other["forward_kl/loss"]) / 3
    assert found["forward_kl/loss"] == pytest.approx(mean, rel=1e-5)
    assert found["cross_entropy/loss"] == pytest.approx(one["cross_entropy/loss"], rel=1e-6)
    assert (found["teacher/big/share"], found["teacher/other/share"]) == pytest.approx((2 / 3, 1 / 3))


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_a_mixture_of_one_teacher_with_itself_is_that_teacher(folder, combine):
    taught = {"one": {"teacher": BOTH, "combine": combine}}
    plain = config(folder, f"twice_{combine}", taught, training__batch_size=12)
    plain["teachers"] = {name: {"path": str(folder / "big")} for name in BOTH}
    (found,) = metrics(plain)
    assert found["forward_kl/loss"] == pytest.approx(
        alone(folder, "one", "big", training__batch_size=12)["forward_kl/loss"], rel=1e-5
    )
    assert found["teacher/big+other/share"] == 1


def test_one_of_them_may_be_cached(folder):
    taught = {"one": {"teacher": "big"}, "two": {"teacher": BOTH}}
    changes = {"training__steps": 3, "training__batch_size": 8}
    live = metrics(config(folder, "live", taught, **changes))
    plain = config(folder, "cached", taught, **changes)
    plain["teachers"]["other"]["cache"] = {"folder": str(folder / "cache")}
    fill(RunConfig.model_validate(plain), Processes("cpu"))
    cached = metrics(plain)
    assert [line["loss"] for line in cached] == pytest.approx([line["loss"] for line in live], rel=1e-5)


def test_one_of_them_may_be_served(folder):
    tiny.write_language_model(folder / "language")
    taught = {"one": {"teacher": "big"}, "two": {"teacher": "language"}}
    both = ("big", "language")
    changes = {"training__steps": 3, "training__batch_size": 8}
    live = metrics(config(folder, "unserved", taught, both, **changes))
    plain = config(folder, "served", taught, both, **changes)
    with serving(load_vlm(folder / "language", dtype="float32").eval()) as server:
        plain["teachers"]["language"]["server"] = {"url": server.url, "model": "teacher-1", "top_logprobs": 40}
        served = metrics(plain)
    assert [line["loss"] for line in served] == pytest.approx([line["loss"] for line in live], rel=1e-4)


def test_one_of_them_may_have_another_tokenizer(folder):
    write_pieces(folder)
    changes = {"loss": [{"name": "uld"}], "student": "learner"}
    taught = {"one": {"teacher": "like"}, "two": {"teacher": "unlike"}}
    (found,) = metrics(config(folder, "tokenizers", taught, ("like", "unlike"), **changes))
    for source, teacher, size in (("one", "like", 12), ("two", "unlike", 8)):
        single = alone(folder, source, teacher, training__batch_size=size, **changes)
        assert found[f"teacher/{teacher}/uld"] == pytest.approx(single["uld/loss"], rel=1e-5)


def test_each_judges_the_students_own_answers_as_it_does_alone(folder):
    drawing = {"on_policy": {"fraction": 1.0, "max_new_tokens": 4}, "loss": [{"name": "reverse_kl"}]}
    taught = {"one": {"teacher": "big"}, "two": {"teacher": "other"}}
    (found,) = metrics(config(folder, "judging", taught, **drawing))
    assert found["on_policy/step"] == 1
    for source, teacher, size in (("one", "big", 12), ("two", "other", 8)):
        single = alone(folder, source, teacher, "judging", training__batch_size=size, **drawing)
        assert found[f"teacher/{teacher}/reverse_kl"] == pytest.approx(single["reverse_kl/loss"], rel=1e-5)


def test_both_judge_an_answer_and_the_datas_is_learned_too(folder):
    loss = [{"name": "forward_kl", "answers": "data"}, {"name": "reverse_kl", "answers": "own"}]
    drawing = {"on_policy": {"fraction": 1.0, "max_new_tokens": 4, "pairs": True}, "loss": loss}
    size = {"training__batch_size": 12}
    (found,) = metrics(config(folder, "both_judging", {"one": {"teacher": BOTH}}, **drawing, **size))
    one, other = (alone(folder, "one", name, "paired", **drawing, **size) for name in BOTH)
    for name in ("forward_kl", "reverse_kl"):
        mean = (2 * one[f"{name}/loss"] + other[f"{name}/loss"]) / 3
        assert found[f"{name}/loss"] == pytest.approx(mean, rel=1e-5)
    assert (found["teacher/big/share"], found["teacher/other/share"]) == pytest.approx((2 / 3, 1 / 3))


def test_an_answer_is_judged_as_text_if_one_of_its_teachers_has_another_tokenizer(folder):
    write_pieces(folder)
    drawing = {"on_policy": {"fraction": 1.0, "max_new_tokens": 4}, "loss": [{"name": "uld"}], "student": "learner"}
    taught = {"one": {"teacher": {"like": 1, "unlike": 1}}}
    size = {"training__batch_size": 12}
    (found,) = metrics(config(folder, "as_text", taught, ("like", "unlike"), **drawing, **size))
    single = alone(folder, "one", "unlike", "as_text", **drawing, **size)
    assert found["teacher/unlike/uld"] == pytest.approx(single["uld/loss"], rel=1e-5)


def test_a_server_judges_the_answers_to_its_own_questions(folder):
    tiny.write_language_model(folder / "language")
    taught, both = {"one": {"teacher": "big"}, "two": {"teacher": "language"}}, ("big", "language")
    drawing = {"on_policy": {"fraction": 1.0, "max_new_tokens": 4}, "loss": [{"name": "forward_kl"}]}
    live = metrics(config(folder, "unserved_judge", taught, both, **drawing))
    plain = config(folder, "served_judge", taught, both, **drawing)
    with serving(load_vlm(folder / "language", dtype="float32").eval()) as server:
        plain["teachers"]["language"]["server"] = {"url": server.url, "model": "teacher-1", "top_logprobs": 40}
        served = metrics(plain)
    assert [line["loss"] for line in served] == pytest.approx([line["loss"] for line in live], rel=1e-4)


def test_each_is_evaluated_as_it_is_alone(folder):
    questions = [{"path": str(folder / "one" / "data.jsonl"), "name": "questions"}]
    changes = {"evaluation__measures": ["exact", "perplexity"], "data__eval": questions}
    metrics(config(folder, "evaluated", {"one": {"teacher": BOTH}}, **changes))
    for name in BOTH:
        alone(folder, "one", name, "evaluated", **changes)
        scores = folder / "evaluated/evaluation/questions" / f"teacher_{name}" / "scores.json"
        single = folder / f"one_{name}_evaluated/evaluation/questions/teacher/scores.json"
        found, expected = (json.loads(path.read_text()) for path in (scores, single))
        assert (found["exact"], found["n"]) == (expected["exact"], 12)
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    page = write_report([folder / "evaluated"]).read_text()
    assert "Teacher · big" in page
    assert "<h2>Teachers</h2>" in page


def test_inspect_and_plan_know_all_of_them(folder):
    taught = {"one": {"teacher": "big"}, "two": {"teacher": BOTH}}
    plain = RunConfig.model_validate(config(folder, "shown", taught))
    lines = list(Inspection(plain).lines())
    assert {frozenset(line) - {"source", "line", "student"} for line in lines} == {
        frozenset({"big"}),
        frozenset({"big", "other"}),
    }
    planned = plan(plain, device="cpu", memory=1.0)
    assert {part.model for part in planned.parts} == {"student", "big", "other"}
    row = planned.memory[planned.configured]
    weights = sum(part.parameters for part in planned.parts if part.model != "student")
    assert (row.placement, row.teacher) == ("several", 4 * weights)

    settings = config(folder, "shown", taught)
    settings["teachers"]["other"]["cache"] = {"folder": str(folder / "not_filled_yet")}
    planned = plan(RunConfig.model_validate(settings), device="cpu", memory=1.0)
    (head,) = (part for part in planned.parts if part.model == "other")
    whole = sum(part.parameters for part in planned.parts if part.model == "big")
    assert head.name == "lm_head"
    assert planned.memory[planned.configured].teacher == 4 * (whole + head.parameters)


@pytest.mark.parametrize(
    ("taught", "changes", "match"),
    [
        ({"one": {}}, {}, "has no teacher; name one of teachers"),
        ({"one": {"teacher": "none"}}, {}, "teacher none of .* is not among teachers"),
        ({"one": {"teacher": "big"}}, {}, "teachers.other: teaches no source"),
        ({"one": {"teacher": BOTH}}, {"teacher": {"path": "x"}}, "one teacher or several"),
        ({"one": {"teacher": BOTH}}, {"loss": [{"name": "vision_features"}]}, "compares with a single teacher"),
        ({"one": {"teacher": BOTH}}, {"loss": [{"name": "taid", "on": "images"}]}, "image tokens are paired"),
        ({"one": {"teacher": BOTH}}, {"loss": [ADAPTIVE]}, "adaptive weighs"),
        ({"one": {"teacher": BOTH}}, {"loss": [{"name": "overlap_kl"}]}, "in one teacher's vocabulary"),
        (
            {"one": {"teacher": BOTH}},
            {"on_policy": WEIGHED},
            "a single teacher's probabilities",
        ),
        ({"one": {"teacher": BOTH}}, {"evaluation": {"measures": ["kl"]}}, "measured against a single teacher"),
    ],
)
def test_what_cannot_be_is_refused(folder, taught, changes, match):
    with pytest.raises((ValueError, UserError), match=match):
        Trainer(RunConfig.model_validate(config(folder, "refused", taught) | changes), Processes("cpu"))
