"""Runs that learn by a loss from outside, on one rank in this process."""

import json
import signal
import sys
from pathlib import Path

import pytest
import tiny
import torch
from outside import module

import vlm_distill as vd
from data.errors import UserError
from vlm_distill.evaluation.rescoring import score_again
from vlm_distill.training import loop


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.write_llava(folder / "teacher", layers=2)
    tiny.write_llava(folder / "student", layers=1)
    tiny.write_data(folder / "data")
    return folder


def distil(models, loss, output, **sections):
    training = {"batch_size": 8, "micro_batch_size": 4, "device": "cpu"}
    data = {"train": models / "data" / "data.jsonl", "workers": 0, "max_length": 64}
    paths = {"student": models / "student", "teacher": models / "teacher", "data": data, "output": output}
    evaluation = {"max_new_tokens": 4, "teacher": False}
    given = {"training": training, "optimizer": {"lr": 1e-2}, "deepspeed": {"stage": 0}, "evaluation": evaluation}
    return vd.distill(**{"steps": 3, **paths, **given, **sections}, loss=loss)


def of_steps(run, key):
    return [line[key] for line in run.metrics if line["kind"] == "train"]


def test_a_run_learns_by_a_plug_in_as_by_ours(here, models, command):
    mine = distil(models, [{"name": "my_losses:Reverse"}, {"name": "taid", "divergence": "my_losses:Reverse"}], "mine")
    ours = distil(models, [{"name": "reverse_kl"}, {"name": "taid", "divergence": "reverse_kl"}], "ours")
    assert of_steps(mine, "Reverse/loss") == of_steps(ours, "reverse_kl/loss")
    assert of_steps(mine, "loss") == of_steps(ours, "loss")
    weights = [run.student.model.state_dict() for run in (mine, ours)]
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())

    # What is made of the run needs no plug-in.
    del sys.modules["my_losses"]
    (here / "my_losses.py").unlink()
    assert "Reverse" in mine.report().read_text()
    assert command("export", "mine", "exported")[0] == 0
    assert "my_losses:Reverse" in (here / "exported" / "README.md").read_text()


def test_a_stopped_run_continues_with_the_state_of_its_loss(here, models, monkeypatch):
    plain, shown = loop.headline, []

    def interrupted(*args):
        shown.append(args)
        if len(shown) == 1:
            signal.raise_signal(signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(loop, "headline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(models, "my_losses:Counting", "stopped")
    with pytest.raises(UserError, match=r"loss\.0\.name: my_losses:Counting → my_losses:Reverse"):
        distil(models, "my_losses:Reverse", "stopped")
    run = distil(models, "my_losses:Counting", "stopped")
    assert of_steps(run, "Counting/updates") == [1, 2, 3]


def test_a_step_that_a_loss_refuses_is_one_line(here, models):
    with pytest.raises(UserError, match=r"^loss Mean: forward returned the shape \[\] for \d+ rows"):
        distil(models, "my_losses:Mean", "refused")


def test_a_run_and_an_evaluation_read_records_by_a_layout_and_score_by_a_function(here, models):
    module(
        here / "my_parts.py",
        """
        from vlm_distill.evaluation.scoring.scores import Scores
        def read_record(record):
            return {"image": record["picture"], "question": record["q"], "answer": record["a"]}
        def score(table, rules):
            lengths = [float(len(row["prediction"]) > 0) for row in table]
            return Scores("answered", 100 * sum(lengths) / len(table), {}, rows=lengths)
        ANSWERED = {"source": {"path": "asked.jsonl"}, "scorer": "my_parts:score"}
        """,
    )
    rows = [{"picture": "0.png", "q": "what color is it?", "a": colour} for colour in ("red", "blue", "green", "black")]
    records = models / "data" / "records.jsonl"
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"path": records, "layout": "my_parts:read_record"}, "workers": 1, "max_length": 64}
    run = distil(models, "taid", "read", data=data, steps=1)
    assert run.metrics[0]["samples"] == 4
    scores = vd.evaluate(models / "student", data=records, layout="my_parts:read_record", max_new_tokens=4)
    assert scores["records"]["n"] == 4

    asked = [{"image": str(models / "data" / "0.png"), "question": row["q"], "answer": row["a"]} for row in rows]
    (here / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = vd.evaluate(models / "student", ["my_parts:ANSWERED"], here, max_new_tokens=4, out="answers")
    assert found["ANSWERED"]["n"] == 4
    again, failures, _ = score_again(Path("answers"), "lmms-eval", Path("again"))
    assert not failures
    assert again[0].scores.main == found["ANSWERED"]["main"]
