"""Benchmarks while a run trains: asked on the way and at its end, written at its end, and the best student kept."""

import base64
import csv
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.predictions import read_predictions
from vlm_distill.models import load_vlm
from vlm_distill.runtime.launch import launch
from vlm_distill.trainer import train
from vlm_distill.training import evaluations

FIRST = 12


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Folder, training data, teacher, and the benchmark's YAML file; its TSV holds pictures in base64."""
    folder = tmp_path_factory.mktemp("benchmarks")
    with (folder / "Colours.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["index", "image", "question", "answer", "category"])
        for i in range(FIRST):
            colour = list(tiny.COLOURS)[i % 4]
            picture = io.BytesIO()
            Image.new("RGB", (20, 16), tiny.COLOURS[colour]).save(picture, "png")
            text = base64.b64encode(picture.getvalue()).decode()
            rows.writerow([i, text, "what color is it?", colour, "light" if i % 4 < 3 else "dark"])
    path = folder / "colours.yaml"
    path.write_text(yaml.safe_dump({"tsv": {"name": "Colours"}, "scorer": "gqa", "metric": "exact match"}))
    return folder, tiny.write_data(folder / "data"), tiny.write_teacher(folder / "teacher"), path


def settings(material, name, **changes):
    folder, data, teacher, benchmark = material
    plain = tiny.config(folder / name, data, teacher, training__steps=6, training__checkpoint_every=2)
    plain["evaluation"] |= {"benchmarks": [str(benchmark)], "benchmark_data": str(folder), "every": 2, "limit": 5}
    plain["evaluation"] |= changes
    return RunConfig.model_validate(plain)


def lines(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def run(material, processes):
    return train(settings(material, "run", best=str(material[3])), processes)


def test_scores_are_logged_and_the_end_is_written(run):
    evaluated = lines(run, "eval")
    assert [(line["step"], line["data"], line["n"], line.get("limited_from")) for line in evaluated] == [
        (2, "colours", 5, FIRST),
        (4, "colours", 5, FIRST),
        (6, "colours", FIRST, None),
    ]
    for who in ("student", "teacher"):
        folder = run / "evaluation" / "colours" / who
        names = {path.name for path in folder.iterdir()}
        assert {"predictions.jsonl", "scores.json", "scores.csv"} < names
        assert any(name.startswith(f"run_{who}_Colours") for name in names)
        scores = json.loads((folder / "scores.json").read_text())
        assert (scores["n"], scores["metric"], scores["out_of"]) == (FIRST, "exact match", 100)
        assert json.loads((run / "summary.json").read_text())["benchmarks"]["colours"][who] == scores["main"]
    assert evaluated[-1]["score"] == json.loads((run / "evaluation/colours/student/scores.json").read_text())["main"]


def test_training_is_not_touched(material, run, processes):
    without = train(settings(material, "without", benchmarks=[], every=None), processes)
    theirs, ours = (load_file(folder / "student" / "model.safetensors") for folder in (without, run))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert [line["loss"] for line in lines(without, "train")] == [line["loss"] for line in lines(run, "train")]


def test_the_best_student_is_a_model(run):
    about = json.loads((run / "best" / "best.json").read_text())
    assert about["name"] == "colours"
    assert about["limit"] == 5
    tried = {line["step"]: line["score"] for line in lines(run, "eval") if line["n"] == 5}
    assert about["score"] >= max(tried.values())
    assert about["step"] == 6 or about["score"] == tried[about["step"]]
    load_vlm(run / "best")


def scripted(monkeypatch, scores):
    """Makes the benchmark's score what a script says, of which each evaluation takes one a model."""
    said = iter(scores)

    def score_answers(*_):
        return SimpleNamespace(scores=SimpleNamespace(main=next(said))), []

    monkeypatch.setattr(evaluations, "score_answers", score_answers)


def best(folder):
    about = json.loads((folder / "best" / "best.json").read_text())
    return about["step"], about["score"]


def test_only_a_higher_score_takes_the_place(material, processes, monkeypatch):
    config = settings(material, "higher", best="colours")
    scripted(monkeypatch, [30.0, float("nan"), 30.0])
    assert best(train(config, processes)) == (2, 30.0)
    first = load_file(material[0] / "higher" / "best" / "model.safetensors")
    assert not all(
        torch.equal(weights, first[name])
        for name, weights in load_file(material[0] / "higher" / "student" / "model.safetensors").items()
    )


def test_a_resumed_run_knows_the_best(material, processes, monkeypatch):
    config = settings(material, "resumed", best="colours")
    scripted(monkeypatch, [50.0, 40.0])
    train(config, processes, until=4)
    scripted(monkeypatch, [40.0, 45.0])  # that of the checkpoint's step again
    assert best(train(config, processes)) == (2, 50.0)


def test_what_a_run_will_find_again_is_not_known(material, processes, monkeypatch):
    config = settings(material, "again", best="colours")
    scripted(monkeypatch, [50.0, 60.0])
    train(config, processes, until=4)
    shutil.rmtree(material[0] / "again" / "checkpoints" / "step_4")
    scripted(monkeypatch, [50.0, 55.0, 20.0])
    assert best(train(config, processes)) == (4, 55.0)


def test_a_source_may_choose(material, processes):
    plain = settings(material, "source", best="questions", teacher=False).model_dump(exclude_none=True)
    plain["evaluation"]["benchmarks"] = []
    plain["data"]["eval"] = [{"path": str(material[1]), "name": "questions"}]
    folder = train(RunConfig.model_validate(plain), processes)
    about = json.loads((folder / "best" / "best.json").read_text())
    assert (about["name"], about["rules"]) == ("questions", None)
    assert 0 <= about["score"] <= 1


@pytest.mark.slow
def test_two_ranks_with_shards(material):
    config = settings(material, "shards", best="colours", every=3).model_dump(exclude_none=True)
    config["deepspeed"] = {"stage": 3, "zero_optimization": {"stage3_param_persistence_threshold": 0}}
    config["teacher"]["placement"] = "shard"
    path = material[0] / "shards.yaml"
    path.write_text(yaml.safe_dump(config))
    assert launch("vlm_distill.train", [str(path)], 2) == 0
    folder = material[0] / "shards"
    assert [(line["step"], line["n"]) for line in lines(folder, "eval")] == [(3, 5), (6, FIRST)]
    for who in ("student", "teacher"):
        assert len(read_predictions(folder / "evaluation" / "colours" / who / "predictions.jsonl")) == FIRST
    kept, last = (load_file(folder / name / "model.safetensors") for name in ("best", "student"))
    assert {name: weights.shape for name, weights in kept.items()} == {n: w.shape for n, w in last.items()}
    step = json.loads((folder / "best" / "best.json").read_text())["step"]
    assert all(torch.equal(kept[name], last[name]) for name in kept) == (step == 6)


def test_what_cannot_be_scored_does_not_end_the_run(material, processes, monkeypatch, capsys):
    def refuse(_, rows, *__, **___):
        # Not where files are checked with stand-in answers: that would end the run before it begins.
        if any(row["prediction"] != "unanswered" for row in rows):
            raise UserError("three answers too few")

    monkeypatch.setattr("vlm_distill.evaluation.benchmark_scores.judged", refuse)
    folder = train(settings(material, "refused", best="colours", every=3), processes)
    assert capsys.readouterr().err.count("colours: not scored: three answers too few") == 3
    assert (folder / "student").is_dir()
    assert not (folder / "best").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"benchmarks": ["popes"]}, "did you mean 'pope'"),
        ({"benchmarks": ["pope"]}, "pope: no data in .*POPE.tsv"),
        ({"rules": "official"}, "has no rules 'official'"),
        ({"best": "color"}, "evaluation.best: color is not evaluated; choose from colours"),
        ({"twice": True}, "2 things to evaluate on are called colours"),
    ],
)
def test_mistakes_are_told_before_models_load(material, processes, monkeypatch, changes, said):
    monkeypatch.setattr("vlm_distill.run.load_teacher", lambda *_: pytest.fail("loaded"))
    changes = dict(changes)
    if changes.pop("twice", False):
        changes["benchmarks"] = [str(material[3])] * 2
    with pytest.raises(UserError, match=said) as error:
        train(settings(material, "mistaken", **changes), processes)
    assert "\n" not in str(error.value)


def test_the_best_needs_evaluations_to_choose_from(material):
    with pytest.raises(ValueError, match="say how often they are"):
        settings(material, "never", every=None, best="colours")
