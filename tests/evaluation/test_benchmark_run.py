"""Benchmarks from a file to scores: a model that answers from a table, rules, a judge, likelihoods, what is written."""

import csv
import json
from dataclasses import replace

import pytest
from answer_tables import Friend, choice, run, write
from PIL import Image

from data.batch import Problem
from data.errors import BadSample, UserError
from vlm_distill.evaluation.benchmark_run import open_benchmarks
from vlm_distill.evaluation.benchmark_scores import Result, average, write_summary
from vlm_distill.evaluation.compare import compare_all
from vlm_distill.evaluation.predictions import read_predictions
from vlm_distill.evaluation.scoring.scores import Scores
from vlm_distill.evaluation.scoring.yes_no import MME_PERCEPTION, MME_REASONING
from vlm_distill.evaluation.vlmevalkit_files import read_prediction_file
from vlm_distill.reporting.score_tables import main_score


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    monkeypatch.setattr("data.tsv.TsvTable.images", lambda self, index: [Image.new("RGB", (2, 2))])


pytestmark = pytest.mark.filterwarnings("ignore:.*md5")


def test_scores_and_what_is_written(tmp_path):
    choice(tmp_path)
    answers = ["A", "B", "The answer is A", "one", "B", "A", "hm"]
    result = run("mmstar", tmp_path, answers)
    # Right: A for 0, B for 1, A for 2; "one" is A where B is right; B for A; A for A? 5 is B; no option at all.
    assert list(result.scores.rows) == [1, 1, 1, 0, 0, 0, 0]
    assert result.scores.main == pytest.approx(100 * 3 / 7)
    out = tmp_path / "out"
    assert [p.score for p in read_predictions(out / "predictions.jsonl")] == list(result.scores.rows)
    assert json.loads((out / "scores.json").read_text())["main"] == pytest.approx(100 * 3 / 7)
    table = read_prediction_file(out / "tiny_MMStar.xlsx")
    assert [row["prediction"] for row in table] == answers
    with (out / "scores.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[1][:4] == ["mmstar", "vlmevalkit", "", "accuracy"]
    assert {row[3] for row in rows} >= {"c0", "c1", "c2"}
    assert not (out / "unfinished").exists()


@pytest.mark.parametrize(
    ("name", "answers", "predictions", "hits"),
    [
        # Whole numbers become 7.0 in the file, in both columns: there the answers are right.
        ("GQA_TestDev_Balanced", ["7", "12", "2.5"], ["7", "12", "2.5"], [1, 1, 1]),
        ("GQA_TestDev_Balanced", ["yes", "None", "N/A"], ["yes", "nan", "None"], [1, 1, 1]),
        ("OCRVQA_TEST", ["yes", "nan"], ["yes", "None"], [1, 1]),
        ("DocVQA_VAL", ["['nan']", "['None']", "['']"], ["N/A", "None", ""], [1, 0.5, 0]),
        # Excel's file spells a carriage return, after which "A" is no word of its own.
        ("MMStar", ["A", "B"], ["A\r\n", "B\n"], [0, 1]),
    ],
)
def test_vlmevalkits_rules_score_what_its_prediction_file_gives_back(tmp_path, name, answers, predictions, hits):
    options = [["oak", "pine", "fir"]] * len(answers) if name == "MMStar" else [[]] * len(answers)
    header = ["index", "image", "question", "answer", *"ABC"[: len(options[0])]]
    rows = [[i, "x" * 70, "What?", answer, *options[i]] for i, answer in enumerate(answers)]
    write(tmp_path, name, header, *rows)
    result = run(name, tmp_path, predictions)
    assert list(result.scores.rows) == hits
    assert [p.answer for p in result.predictions] == predictions


def test_a_judge_decides_what_the_rules_cannot(tmp_path):
    choice(tmp_path)
    answers = ["A", "B", "A", "B", "A", "B", "what?"]
    friend = Friend("A")
    assert run("mmstar", tmp_path, answers).scores.judge == [6]
    result = run("mmstar", tmp_path, answers, judge=friend)
    assert result.scores.main == 100
    assert not result.scores.judge
    (prompt,) = friend.prompts
    assert "Is it 6?" in prompt
    assert "B. two" in prompt
    assert "what?" in prompt


def test_an_unreadable_reply_is_asked_for_once_more_and_counted(tmp_path):
    choice(tmp_path)
    friend = Friend("the first or the second")
    result = run("mmstar", tmp_path, ["A", "B", "A", "B", "A", "B", "what?"], judge=friend)
    assert result.scores.main == pytest.approx(100 * 6 / 7)
    assert len(friend.prompts) == 2
    summary = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert summary["fallbacks"] == {"an unreadable reply of the judge": 1}


def test_an_unanswering_judge_loses_no_answer(tmp_path):
    choice(tmp_path)

    class Gone:
        def ask(self, prompts):
            raise UserError("judge: nobody there")

    answers = ["A", "B", "A", "B", "A", "B", "what?"]
    result = run("mmstar", tmp_path, answers, judge=Gone(), resume={"model": 1})
    assert result.failure == "judge: nobody there"
    assert len(read_predictions(tmp_path / "out" / "predictions.jsonl")) == 7
    # Every answer is there already: the model is not asked again.
    assert run("mmstar", tmp_path, {}, judge=Friend("A"), resume={"model": 1}).scores.main == 100


def test_likelihood_chooses_among_the_options(tmp_path):
    choice(tmp_path)
    result = run("mmstar", tmp_path, ["B"] * 7, likelihood=True)
    assert [p.answer for p in result.predictions] == ["B"] * 7
    assert result.scores.main == pytest.approx(100 * 3 / 7)
    header = ["index", "image", "question", "answer", "category"]
    write(tmp_path, "POPE", header, *([i, "x" * 70, f"Is it {i}?", "Yes", "random"] for i in range(4)))
    assert run("pope", tmp_path, ["No"] * 4, likelihood=True).scores.overall["acc"] == 0
    write(tmp_path, "DocVQA_VAL", header[:4], [1, "x" * 70, "What?", "['a']"])
    opened = open_benchmarks(["docvqa", "pope"], tmp_path, "vlmevalkit", likelihood=True)
    assert [benchmark.name for benchmark in opened.ready] == ["pope"]
    assert "no options to choose from" in opened.failures["docvqa"]


def test_hidden_answers_give_predictions_alone(tmp_path):
    header = ["index", "image", "question", "A", "B", "category", "l2-category"]
    write(tmp_path, "MMBench_V11", header, *([i, "x" * 70, "Which?", "one", "two", "c", "d"] for i in range(3)))
    result = run("mmbench_test", tmp_path, ["A"] * 3)
    assert result.scores is None
    assert len(read_prediction_file(tmp_path / "out" / "tiny_MMBench_V11.xlsx")) == 3


def test_rules_that_a_benchmark_has_not(tmp_path):
    choice(tmp_path)
    with pytest.raises(UserError, match="mmstar has no rules 'official'; it has vlmevalkit, lmms-eval"):
        run("mmstar", tmp_path, ["A"] * 7, rules="official")


def test_the_average_of_the_eight_is_of_whole_benchmarks_by_vlmevalkits_rules(tmp_path):
    names = ["mmbench", "mmstar", "mmmu", "mathvista", "ocrbench", "ai2d", "hallusionbench", "mmvet"]
    results = [Result(n, "m", "vlmevalkit", [], Scores("m", 500.0 if n == "ocrbench" else 60.0, {}), []) for n in names]
    assert average(results[:-1]) is None
    assert average(results) == pytest.approx((7 * 60 + 50) / 8, abs=0.05)
    write_summary(tmp_path, results)
    assert json.loads((tmp_path / "scores.json").read_text())["average"] == average(results)
    for change in ({"limited": True}, {"rules": "lmms-eval"}, {"skipped": [Problem("mmvet", 1, "not an image")]}):
        assert average([*results[:-1], replace(results[-1], **change)]) is None


def test_two_models_are_compared_by_the_rules_scores(tmp_path):
    choice(tmp_path)
    run("mmstar", tmp_path, ["A", "B", "A", "B", "A", "B", "A"], tmp_path / "good")
    run("mmstar", tmp_path, ["A"] * 7, tmp_path / "bad")
    (first, mean), (second, result) = compare_all([tmp_path / "good", tmp_path / "bad"])
    assert (first, mean) == (str(tmp_path / "good"), 1.0)
    assert second == str(tmp_path / "bad")
    assert result.difference == pytest.approx(-3 / 7)
    assert (result.only_a, result.only_b) == (0, 3)
    with pytest.raises(UserError, match="two or more"):
        compare_all([tmp_path / "good"])
    with pytest.raises(UserError, match="no predictions"):
        compare_all([tmp_path / "good", tmp_path / "none"])


def test_a_limit_asks_all_or_none_of_what_is_scored_together(tmp_path):
    header = ["index", "image", "question", "answer", "category", "image_path"]
    rows = [
        [i, "x" * 70, f"Is it {i}?", "Yes", task, f"{task}/{i // 2}"] for task in ("OCR", "count") for i in range(10)
    ]
    write(tmp_path, "MME", header, *rows)
    for rules in ("lmms-eval", "vlmevalkit"):  # VLMEvalKit's rules want all of MME's tasks
        result = run("mme", tmp_path, ["Yes"] * 10, rules=rules, limit=7)
        assert [p.index for p in result.predictions] == [0, 1, 4, 5, 10, 11, 14, 15]
        assert (result.scores.main, result.out_of, result.limited) == (400, 400, True)

    header = ["index", "image", "question", "A", "B", "answer", "category", "l2-category"]
    copies = [[i + 1_000_000 * k, "x" * 70, "?", "a", "b", "A", "c", "d"] for i in range(4) for k in range(2)]
    write(tmp_path, "MMBench_DEV_EN_V11", header, *copies)
    result = run("mmbench", tmp_path, {row[0]: "A" for row in copies}, limit=4)
    assert [p.index for p in result.predictions] == [0, 1, 4, 5]


MME = ["index", "image", "question", "answer", "category", "image_path"]
TASKS = (*MME_PERCEPTION, *MME_REASONING)


def mme(folder, pairs=2, tasks=TASKS):
    rows = [[f"{t}/{i // 2}.png", t] for t in tasks for i in range(2 * pairs)]
    write(folder, "MME", MME, *([i, "x" * 70, f"Is it {i}?", "Yes", t, path] for i, (path, t) in enumerate(rows)))
    return len(rows)


def broken(*indices):
    """Images, some of them unreadable."""

    def images(self, index):
        if self[index]["index"] in indices:
            raise BadSample("not an image", "x")
        return [Image.new("RGB", (2, 2))]

    return images


@pytest.mark.parametrize("rules", ["vlmevalkit", "lmms-eval"])
def test_a_pair_that_lacks_an_answer_is_left_out_and_counted_and_the_others_are_scored(tmp_path, monkeypatch, rules):
    n = mme(tmp_path)
    monkeypatch.setattr("data.tsv.TsvTable.images", broken(3))
    result = run("mme", tmp_path, ["Yes"] * n, rules=rules)
    assert (result.scores.main, result.out_of, result.n) == (2800, 2800, n - 2)
    assert [(p.reason, p.line) for p in result.skipped] == [
        ("not an image", 5),
        ("another of its group has no answer", 4),
    ]
    assert len(result.predictions) == n - 1
    assert result.predictions[2].score is None
    assert not result.whole


def test_a_pair_of_one_question_is_no_pair(tmp_path):
    n = mme(tmp_path)
    lines = (tmp_path / "MME.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "MME.tsv").write_text("".join(lines[:-1]))
    opened = open_benchmarks(["mme"], tmp_path, "vlmevalkit")
    assert not opened.failures
    result = run("mme", tmp_path, ["Yes"] * n)
    assert (result.scores.main, result.n, len(result.skipped)) == (2800, n - 2, 1)


def test_the_figures_of_a_set_are_scored_together_or_not_at_all(tmp_path, monkeypatch):
    header = ["index", "image", "question", "answer", "category", "l2-category"]
    places = [f"hb_VD_math_{s}_{f}_{q}" for s in range(3) for f in range(2) for q in range(2)]
    write(tmp_path, "HallusionBench", header, *([p, "x" * 70, f"Is it {p}?", "Yes", "VD", "math"] for p in places))
    answers = dict.fromkeys(places, "Yes")
    result = run("hallusionbench", tmp_path, answers, limit=3)
    assert [p.index for p in result.predictions] == [0, 1, 2, 3]
    monkeypatch.setattr("data.tsv.TsvTable.images", broken("hb_VD_math_1_1_0"))
    result = run("hallusionbench", tmp_path, answers | {places[4]: "No"})
    assert (result.n, result.scores.main) == (8, 100)


def test_ocrbench_with_a_limit_says_of_how_many(tmp_path):
    header = ["index", "image", "question", "answer", "category"]
    rows = [[i, "x" * 70, "What?", "['a']", "Doc-oriented VQA"] for i in range(12)]
    write(tmp_path, "OCRBench", header, *rows)
    for rules, name, share in (("vlmevalkit", "Final Score Norm", 50), ("lmms-eval", "ocrbench_accuracy", 0.5)):
        if rules == "lmms-eval":
            write(tmp_path, "OCRBench", header, *([*row[:3], "a", row[4]] for row in rows))
        result = run("ocrbench", tmp_path, ["a", "b", "b"] * 4, rules=rules, limit=4)
        assert (result.scores.main, result.out_of, main_score(result)) == (4, 4, "4.00 of 4 (limited)")
        result = run("ocrbench", tmp_path, ["a", "b"] * 6, rules=rules, limit=11)
        assert main_score(result) == f"{result.scores.main:.2f} of 11 (limited)"
        assert result.scores.overall[name] == pytest.approx(result.scores.main / 11 * share * 2)
    summary = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (summary["limited_from"], summary["out_of"]) == (12, 11)
    with (tmp_path / "out" / "scores.csv").open() as file:
        assert next(csv.DictReader(file))["limited_from"] == "12"


def test_what_a_file_alone_shows_is_refused_before_a_question_is_asked(tmp_path):
    mme(tmp_path, tasks=TASKS[:-1])
    header = ["index", "image", "question", "answer", "category"]
    write(tmp_path, "OCRBench", header, [1, "x" * 70, "What?", "['a']", "Poetry"])
    write(tmp_path, "HallusionBench", header, ["hb_VD_math_0_0_0", "x" * 70, "Is it?", "Yes", "VD"])
    write(tmp_path, "POPE", header[:-1], [1, "x" * 70, "Is it?", "Yes"])
    choice(tmp_path)
    names = ["mme", "ocrbench", "hallusionbench", "pope", "docvqa", "mmstar"]
    opened = open_benchmarks(names, tmp_path, "vlmevalkit")
    assert [benchmark.name for benchmark in opened.ready] == ["mmstar"]
    for name, said in {
        "mme": "no question of text_translation",
        "ocrbench": "no category 'Poetry'",
        "hallusionbench": "no column 'l2-category'",
        "pope": "no column 'category'",
        "docvqa": "no data in",
    }.items():
        assert said in opened.failures[name]


def test_a_benchmark_that_cannot_ask_a_question_says_so(tmp_path, monkeypatch):
    choice(tmp_path)
    monkeypatch.setattr("data.tsv.TsvTable.images", broken(*range(7)))
    result = run("mmstar", tmp_path, ["A"] * 7)
    assert result.failure == "no question could be asked: 7 × not an image (line 2: x)"
    assert result.scores is None
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["failure"] == result.failure


@pytest.mark.parametrize("rules", ["vlmevalkit", "lmms-eval", "official"])
def test_thoughts_do_not_count_under_any_rules_and_are_kept(tmp_path, rules):
    header = ["index", "image", "question", "answer", "category"]
    write(tmp_path, "POPE", header, *([i, "x" * 70, f"Is it {i}?", "Yes", "random"] for i in range(4)))
    said = ["<think>there is no dog… wait</think>\n\nYes", "no… wait</think>Yes", "◁think▷no◁/think▷Yes", "<think>no"]
    result = run("pope", tmp_path, said, rules=rules)
    assert [p.score for p in result.predictions[:3]] == [1, 1, 1]
    assert [p.generated for p in read_predictions(tmp_path / "out" / "predictions.jsonl")] == said
    assert result.cut == 1
    assert result.predictions[3].answer == ""
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["cut"] == 1


def test_answers_are_asked_once_whatever_the_rules_where_these_ask_alike(tmp_path):
    header = ["index", "image", "question", "answer", "category"]
    write(tmp_path, "POPE", header, *([i, "x" * 70, f"Is it {i}?", "Yes", "random"] for i in range(4)))
    run("pope", tmp_path, ["Yes"] * 4, resume={"model": 1})
    assert run("pope", tmp_path, {}, rules="official", resume={"model": 1}).scores.main == 100
    with pytest.raises(KeyError):  # lmms-eval asks otherwise
        run("pope", tmp_path, {}, rules="lmms-eval", resume={"model": 1})
