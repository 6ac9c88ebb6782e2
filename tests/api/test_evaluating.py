"""Evaluation from Python: of paths and of models and questions in memory."""

import base64
import json

import pandas
import pytest
import tiny
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlm_distill as vd


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.write_llava(folder / "model", layers=2)
    tiny.write_data(folder / "data", rows=8)
    image = base64.b64encode((folder / "data" / "0.png").read_bytes()).decode()
    rows = [{"question": "is it red?", "answer": "Yes"}, {"question": "is it blue?", "answer": "No"}]
    cells = [{"index": i, "image": image, "category": "c", **row} for i, row in enumerate(rows)]
    pandas.DataFrame(cells).to_csv(folder / "POPE.tsv", sep="\t", index=False)
    return folder


def pair(folder):
    return AutoModelForImageTextToText.from_pretrained(folder / "model"), AutoProcessor.from_pretrained(
        folder / "model"
    )


def test_questions_in_memory_are_scored_as_those_of_a_file(folder, capfd):
    records = [json.loads(line) for line in (folder / "data" / "data.jsonl").read_text().splitlines()]
    records = [record | {"image": Image.open(folder / "data" / record["image"])} for record in records]
    model = pair(folder)
    model[0].train()
    capfd.readouterr()
    held = vd.evaluate(model, data=records, measures=["exact", "perplexity"], max_new_tokens=4)
    stored = vd.evaluate(
        folder / "model", data=folder / "data" / "data.jsonl", measures="exact,perplexity", max_new_tokens=4
    )
    assert capfd.readouterr() == ("", "")
    assert held == stored
    assert held["data"]["n"] == 8
    assert model[0].training


def test_a_benchmark_is_scored_and_written_when_asked(folder, capfd):
    scores = vd.evaluate(folder / "model", ["pope"], folder, out=folder / "scores", limit=1)
    assert capfd.readouterr() == ("", "")
    written = json.loads((folder / "scores" / "scores.json").read_text())["benchmarks"]
    assert [scores["pope"]] == written
    assert scores["pope"]["n"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "missing.jsonl"}, "^data file missing.jsonl does not exist"),
        ({}, r"^nothing to ask: name benchmarks \(benchmarks\) or files of questions \(data\)"),
        ({"data": [{"question": "?"}]}, "^data: 1 of 1 questions left out, no questions could be used"),
        ({"benchmarks": "pope", "measures": ["kl"]}, r"^measures: is about data, not benchmarks"),
        ({"benchmarks": "pope", "batchsize": 3}, "^evaluate: no argument 'batchsize'; did you mean batch_size"),
        ({"benchmarks": "pope", "data": "nowhere"}, "^pope: .*nowhere"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, message):
    with pytest.raises(vd.UserError, match=message) as caught:
        vd.evaluate(folder / "model", **arguments)
    assert "\n" not in str(caught.value)
