"""Prediction files are read back as VLMEvalKit reads its own: golden cases, and what a cell cannot hold."""

import json
from pathlib import Path

import pytest

from data.errors import UserError
from vlm_distill.evaluation.scoring.cells import prediction
from vlm_distill.evaluation.scoring.scores import missing
from vlm_distill.evaluation.vlmevalkit_files import (
    LONGEST,
    prediction_file,
    read_prediction_file,
    write_prediction_file,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "scoring" / "vlmevalkit__prediction_file.jsonl"
CASES = [json.loads(line) for line in GOLDEN.read_text("utf-8").splitlines()]


def identity(case):
    return f"{case['input']['format']}: {case['input']['predictions'][0][:9]!r}"


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_predictions_come_back_as_vlmevalkit_sees_them(case, tmp_path):
    predictions, want = case["input"]["predictions"], case["expected"]
    path = tmp_path / f"m_d.{case['input']['format']}"
    write_prediction_file(path, [{"index": i, "question": "q"} for i in range(len(predictions))], predictions)
    read = read_prediction_file(path)
    got = [None if missing(row["prediction"]) else row["prediction"] for row in read]
    assert got == want["loaded"]
    assert list(map(type, got)) == list(map(type, want["loaded"]))
    assert [prediction(row, "vlmevalkit") for row in read] == want["as_scored_text"]


@pytest.mark.parametrize("format", ["xlsx", "tsv"])
def test_columns_lists_and_characters_that_no_file_can_hold(tmp_path, format):
    rows = [
        {"index": 3, "question": "=SUM(A1)", "answer": ["it's", "2"], "A": None, "score": float("nan")},
        {"index": 4, "question": "tab\tline\nend", "answer": "#N/A x", "A": 1.5, "score": float("inf")},
    ]
    path = prediction_file(tmp_path / "new", "owner/model", "POPE", format)
    assert path == tmp_path / "new" / f"model_POPE.{format}"
    write_prediction_file(path, rows, ["bell\x07 half\ud83d end\ufffe", "x" * 40_000])
    got = read_prediction_file(path)
    assert list(got[0]) == ["index", "question", "answer", "A", "score", "prediction"]
    assert got[0] | {"A": None} == {
        "index": 3,
        "question": "=SUM(A1)",
        "answer": "[\"it's\", '2']",
        "A": None,
        "score": None,
        "prediction": "bell_x0007_ half end_xFFFE_" if format == "xlsx" else "bell half end",
    }
    assert (got[1]["question"], got[1]["answer"], got[1]["A"]) == ("tab\tline\nend", "#N/A x", 1.5)
    assert len(got[1]["prediction"]) == (LONGEST if format == "xlsx" else 40_000)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_no_prediction_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.xlsx").write_bytes(b"no archive")
    (tmp_path / "bad.tsv").write_text("index\tanswer\n1\tx\n")
    for name, message in (
        ("bad.xlsx", "cannot be read"),
        ("none.xlsx", "cannot be read"),
        ("bad.tsv", "no column 'prediction'; its columns: index, answer"),
        ("bad.csv", "xlsx or tsv"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_prediction_file(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="xlsx or tsv"):
        write_prediction_file(tmp_path / "bad.csv", [], [])
