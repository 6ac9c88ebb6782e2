"""Kept answers are scored again by other rules or a judge, without a model, and stay as they are."""

import csv
import json
from pathlib import Path

import pytest
from answer_tables import Friend, choice, run, write
from PIL import Image

from data.errors import UserError
from vlm_distill.evaluation.rescoring import default_out, known_rules, score_again

pytestmark = pytest.mark.filterwarnings("ignore:.*md5")

POPE = ["index", "image", "question", "answer", "category"]


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    monkeypatch.setattr("data.tsv.TsvTable.images", lambda self, index: [Image.new("RGB", (2, 2))])


def pope(folder, answers=("Yes",) * 4, question="Is it"):
    write(folder, "POPE", POPE, *([i, "x" * 70, f"{question} {i}?", a, "random"] for i, a in enumerate(answers)))


@pytest.fixture
def evaluated(tmp_path):
    """An evaluation of two benchmarks, and the data folder."""
    pope(tmp_path)
    choice(tmp_path)
    out = tmp_path / "eval"
    about = {"data": str(tmp_path)}
    said = ["Yes, it is", "<think>no</think>Yes", "no", "<think>yes"]
    run("pope", tmp_path, said, out / "pope", resume={"model": 1}, about=about)
    run("mmstar", tmp_path, ["A", "B", "A", "B", "A", "B", "what?"], out / "mmstar", resume={"model": 1}, about=about)
    return out


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scores(results):
    return {result.benchmark: result.scores.main for result in results}


def test_other_rules_score_the_same_answers_and_change_none(evaluated, tmp_path):
    before = contents(evaluated)
    results, failures, _ = score_again(evaluated, "lmms-eval", tmp_path / "again")
    assert not failures
    by_row = {result.benchmark: [p.score for p in result.predictions] for result in results}
    assert by_row["pope"] == [0, 1, 0, 0]  # lmms-eval wants "yes" and nothing else
    assert [p.generated for p in results[1].predictions][1] == "<think>no</think>Yes"
    assert contents(evaluated) == before
    names = {path.name for path in (tmp_path / "again" / "pope").iterdir()}
    assert {"predictions.jsonl", "asked.json", "scores.json", "scores.csv"} < names
    summary = json.loads((tmp_path / "again" / "scores.json").read_text())
    assert [found["rules"] for found in summary["benchmarks"]] == ["lmms-eval"] * 2
    with (tmp_path / "again" / "scores.csv").open() as file:
        assert {row["rules"] for row in csv.DictReader(file)} == {"lmms-eval"}
    # Scored once more from there, by the first rules: what the evaluation said.
    back, _, _ = score_again(tmp_path / "again", "vlmevalkit", tmp_path / "back")
    assert scores(back)["pope"] == json.loads((evaluated / "pope" / "scores.json").read_text())["main"]


def test_a_judge_sees_kept_answers(evaluated, tmp_path):
    friend = Friend("A")
    results, _, _ = score_again(evaluated / "mmstar", None, tmp_path / "judged", judge=friend)
    assert scores(results) == {"mmstar": 100}
    assert len(friend.prompts) == 1


def test_right_answers_are_read_anew_and_changed_questions_left_out(evaluated, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    pope(other, ("Yes", "Yes", "No", "No"))
    (result,), _, _ = score_again(evaluated / "pope" / "predictions.jsonl", None, tmp_path / "again", data=other)
    assert [p.score for p in result.predictions] == [1, 1, 1, 0]
    assert [p.references for p in result.predictions][2] == ["No"]
    pope(other, question="Was it")
    (result,), failures, _ = score_again(evaluated / "pope", None, tmp_path / "changed", data=other)
    assert failures["pope"] == (
        "no question could be asked: 4 × the question has changed since it was asked (the first in line 2)"
    )


def test_answers_kept_before_there_were_digests_are_scored_by_their_text(evaluated, tmp_path):
    (evaluated / "pope" / "asked.json").unlink()
    path = evaluated / "pope" / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    new = ("generated", "asked", "by")
    path.write_text("".join(json.dumps({k: v for k, v in p.items() if k not in new}) + "\n" for p in lines))
    (result,), _, _ = score_again(evaluated / "pope", "official", tmp_path / "again", data=tmp_path)
    assert len(result.predictions) == 4
    assert result.scores.rows[0] == 1


def test_a_limit_stays_a_limit(tmp_path):
    pope(tmp_path)
    run("pope", tmp_path, ["Yes"] * 4, tmp_path / "eval", limit=2, resume={"model": 1}, about={"data": str(tmp_path)})
    (result,), _, _ = score_again(tmp_path / "eval", "lmms-eval", tmp_path / "again")
    assert result.limited
    assert json.loads((tmp_path / "again" / "pope" / "scores.json").read_text())["limited_from"] == 4


@pytest.mark.parametrize("out", ["eval", "eval2"])
def test_no_answers_are_replaced(evaluated, tmp_path, out):
    run("pope", tmp_path, ["No"] * 4, tmp_path / "eval2" / "pope")
    with pytest.raises(UserError, match="holds answers that these scores would replace; name another --out"):
        score_again(evaluated, "vlmevalkit", tmp_path / out)


def test_one_benchmark_that_cannot_be_scored_ends_no_other(evaluated, tmp_path):
    results, failures, _ = score_again(evaluated, "official", tmp_path / "again")
    assert list(scores(results)) == ["pope"]
    assert failures == {"mmstar": "has no rules 'official'; it has vlmevalkit, lmms-eval"}


def test_mistakes_are_one_line(evaluated, tmp_path):
    with pytest.raises(UserError, match="evaluate first, or name another folder"):
        score_again(tmp_path / "nowhere", None, tmp_path / "again")
    with pytest.raises(UserError, match="no 'kit'; there are vlmevalkit"):
        known_rules("kit")
    for folder in evaluated.iterdir():
        for name in ("asked.json", "scores.json"):
            (folder / name).unlink()
    with pytest.raises(UserError, match="no answers to benchmarks there"):
        score_again(evaluated, None, tmp_path / "again")


def test_scores_go_beside_the_answers_by_default(evaluated):
    beside = evaluated.parent
    assert default_out(evaluated, "lmms-eval", None) == beside / "eval_lmms-eval"
    assert default_out(evaluated, None, "org/qwen3") == beside / "eval_again_by_qwen3"
    assert default_out(evaluated / "pope" / "predictions.jsonl", "official", None) == beside / "eval_pope_official"
    run_folder = Path("/runs/taid/evaluation/pope/student")
    assert default_out(run_folder, "official", None) == Path("/runs/taid/evaluation/pope/student_official")
