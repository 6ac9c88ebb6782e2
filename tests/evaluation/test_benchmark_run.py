"""Benchmarks from a file to scores: a model that answers from a table, rules, a judge, likelihoods, what is written."""

import csv
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from data.errors import UserError
from vlm_distill.evaluation import benchmarks
from vlm_distill.evaluation.benchmark_run import CannotScore, Result, average, run_benchmark, write_summary
from vlm_distill.evaluation.compare import compare_all
from vlm_distill.evaluation.prediction_files import read_prediction_file
from vlm_distill.evaluation.runner import read_predictions
from vlm_distill.evaluation.scoring.base import Scores
from vlm_distill.models.interface import Answer


class Table:
    """Answers questions from a table; the likeliest option is the one it would say."""

    def __init__(self, answers):
        self.answers = answers
        self.processor = SimpleNamespace(encode=lambda conversation, images, *, generation: None)

    def generate(self, prompts, *, max_new_tokens):
        return [Answer(self.answers[conversation.metadata["index"]], [1], [-0.5]) for conversation, _ in prompts]

    def score_options(self, prompts, options):
        said = [self.answers[conversation.metadata["index"]] for conversation, _ in prompts]
        return [
            [0.0 if text == answer else -1.0 for text in texts] for texts, answer in zip(options, said, strict=True)
        ]


class Friend:
    """A judge that replies with one text."""

    def __init__(self, reply):
        self.reply, self.prompts = reply, []

    def ask(self, prompts):
        self.prompts += prompts
        return [self.reply for _ in prompts]


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    monkeypatch.setattr("data.tsv.TsvTable.images", lambda self, index: [Image.new("RGB", (2, 2))])


def write(folder, name, header, *rows):
    with (folder / f"{name}.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])


def choice(folder, name="MMStar"):
    header = ["index", "image", "question", "A", "B", "answer", "category", "l2-category"]
    write(
        folder,
        name,
        header,
        *([i, "x" * 70, f"Is it {i}?", "one", "two", "AB"[i % 2], f"c{i % 3}", "d"] for i in range(7)),
    )


@pytest.mark.filterwarnings("ignore:.*md5")
def run(name, folder, answers, out=None, rules="vlmevalkit", **options):
    entry, model = benchmarks.get(name), Table(answers)
    questions = benchmarks.find(entry, folder, rules=rules)
    load = options.pop("load", lambda image: image)
    return run_benchmark(
        model,
        entry,
        questions,
        out or folder / "out",
        rules=rules,
        name="some/tiny",
        load=load,
        batch_size=3,
        **options,
    )


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
    with pytest.raises(UserError, match="nobody there"):
        run("mmstar", tmp_path, answers, judge=Gone(), resume="m")
    # Every answer is there already: the model is not asked again.
    assert run("mmstar", tmp_path, {}, judge=Friend("A"), resume="m").scores.main == 100


def test_likelihood_chooses_among_the_options(tmp_path):
    choice(tmp_path)
    result = run("mmstar", tmp_path, ["B"] * 7, likelihood=True)
    assert [p.answer for p in result.predictions] == ["B"] * 7
    assert result.scores.main == pytest.approx(100 * 3 / 7)
    header = ["index", "image", "question", "answer", "category"]
    write(tmp_path, "POPE", header, *([i, "x" * 70, f"Is it {i}?", "Yes", "random"] for i in range(4)))
    assert run("pope", tmp_path, ["No"] * 4, likelihood=True).scores.overall["acc"] == 0
    write(tmp_path, "DocVQA_VAL", header[:4], [1, "x" * 70, "What?", "['a']"])
    with pytest.raises(UserError, match="no options to choose from"):
        run("docvqa", tmp_path, {1: "a"}, likelihood=True)


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


def test_the_average_of_the_eight(tmp_path):
    names = ["mmbench", "mmstar", "mmmu", "mathvista", "ocrbench", "ai2d", "hallusionbench", "mmvet"]
    results = [Result(n, "m", "vlmevalkit", [], Scores("m", 500.0 if n == "ocrbench" else 60.0, {}), []) for n in names]
    assert average(results[:-1]) is None
    assert average(results) == pytest.approx((7 * 60 + 50) / 8, abs=0.05)
    write_summary(tmp_path, results)
    assert json.loads((tmp_path / "scores.json").read_text())["average"] == average(results)


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
    result = run("mme", tmp_path, ["Yes"] * 10, rules="lmms-eval", limit=7)
    assert [p.index for p in result.predictions] == [0, 1, 4, 5, 10, 11, 14, 15]
    assert result.scores.main == 400
    with pytest.raises(CannotScore, match="mme: "):
        run("mme", tmp_path, ["Yes"] * 10, limit=7)

    header = ["index", "image", "question", "A", "B", "answer", "category", "l2-category"]
    copies = [[i + 1_000_000 * k, "x" * 70, "?", "a", "b", "A", "c", "d"] for i in range(4) for k in range(2)]
    write(tmp_path, "MMBench_DEV_EN_V11", header, *copies)
    result = run("mmbench", tmp_path, {row[0]: "A" for row in copies}, limit=4)
    assert [p.index for p in result.predictions] == [0, 1, 4, 5]
