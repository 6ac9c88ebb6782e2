"""A benchmark's section: main scores, groups, paired comparisons by its rules, and pictures that only the data hold."""

import base64
import csv
import io
import json
import random
import re
from types import SimpleNamespace

import pytest
from page import read
from PIL import Image

from vlm_distill.evaluation.benchmark_lookup import find_questions, get_benchmark
from vlm_distill.evaluation.benchmark_run import OpenBenchmark, run_benchmark
from vlm_distill.evaluation.judge import UNREADABLE
from vlm_distill.evaluation.kept_answers import AnswerFolder
from vlm_distill.evaluation.pictures import find_picture
from vlm_distill.evaluation.predictions import read_predictions
from vlm_distill.models.answers import Answer
from vlm_distill.reporting.report import write_report

N = 40

pytestmark = pytest.mark.filterwarnings("ignore:.*md5")


class Guesser:
    """Answers yes-or-no questions rightly with a given probability."""

    def __init__(self, accuracy, seed):
        self.accuracy, self.random = accuracy, random.Random(seed)
        self.processor = SimpleNamespace(encode=lambda conversation, images, *, generation: None)

    def generate(self, prompts, *, max_new_tokens):
        rows = [conversation.metadata for conversation, _ in prompts]
        flip = {"Yes": "No", "No": "Yes"}
        said = [row["answer"] if self.random.random() < self.accuracy else flip[row["answer"]] for row in rows]
        return [Answer(text, [1], [-0.2]) for text in said]


@pytest.fixture
def folder(tmp_path):
    """POPE's TSV, with a picture of its own for every two questions; some are large, some tiny."""
    with (tmp_path / "POPE.tsv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["index", "image", "question", "answer", "category"])
        for i in range(N):
            side = 400 if i % 4 < 2 else 16
            content = io.BytesIO()
            Image.new("RGB", (side, side), (i // 2 * 6, 90, 140)).save(content, "png")
            text = base64.b64encode(content.getvalue()).decode()
            kind = ("random", "popular", "adversarial")[i % 3]
            rows.writerow([i, text, f"Is there a <b>cat</b> {i}?", "Yes" if i % 2 else "No", kind])
    return tmp_path


@pytest.fixture
def answered(folder, make_run):
    """Makes a run that was scored on POPE, and on a source of its own where it has evaluations."""

    def make(name, accuracy=0.7, *, teacher=0.95, seed=1, rules="vlmevalkit", evaluations=0):
        run = make_run(name, evaluations=evaluations)
        entry = get_benchmark("pope")
        benchmark = OpenBenchmark(entry, find_questions(entry, folder, rules=rules), rules)
        models = {"student": Guesser(accuracy, seed)}
        if teacher is not None:
            models["teacher"] = Guesser(teacher, 7)
        place = run / "evaluation" / "pope"
        for who, model in models.items():
            run_benchmark(model, benchmark, folder=AnswerFolder(place / who, who, pictures=place / "pictures"))
        lines = [{"step": step, "data": "pope", "score": 50 + step, "n": 20, "seconds": step} for step in (20, 40)]
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps({"kind": "eval", **line}) + "\n" for line in lines)
        return run

    return make


def test_a_run_with_a_benchmark_alone(answered):
    run = answered("taid")
    page = read(write_report([run]))
    assert page.headings[:4] == ["Distillation report", "pope", "On the same questions", "By group"]
    assert not any(heading.startswith(("Scores", "By question type", "Gallery")) for heading in page.headings)
    scores = json.loads((run / "evaluation/pope/student/scores.json").read_text())
    text = re.sub(r"\s+", " ", page.text)
    assert f"{scores['main']:.1f}" in text
    assert "F1, by the rules of vlmevalkit." in text
    assert "adversarial" in text
    assert "Student · taid against Teacher" in text.replace("\xa0", " ").replace("  ", " ")
    assert "Score by step · pope" in text
    assert "Accuracy by" not in text
    assert "Teacher scores higher" in text
    assert "Is there a <b>cat</b>" in text  # escaped
    assert page.alts
    assert "no picture file" not in text


def test_pictures_are_kept_once_and_small(answered):
    run = answered("taid")
    pictures = list((run / "evaluation" / "pope" / "pictures").iterdir())
    assert len(pictures) == N // 2
    assert {path.suffix: Image.open(path).size for path in pictures} == {".png": (16, 16), ".jpg": (224, 224)}
    for p in read_predictions(run / "evaluation/pope/teacher/predictions.jsonl"):
        assert find_picture(p.image, [run / "evaluation/pope/pictures"]) in pictures


def test_without_the_pictures_it_says_so(answered):
    run = answered("taid")
    for path in (run / "evaluation" / "pope" / "pictures").iterdir():
        path.unlink()
    page = read(write_report([run]))
    assert "no picture file" in page.text
    assert not page.alts


def test_runs_side_by_side_and_other_sections_as_they_were(answered):
    runs = [answered("taid", 0.8, evaluations=2), answered("ce", 0.6, seed=3, teacher=None, evaluations=2)]
    page = read(write_report(runs))
    assert page.headings[1] == "Scores on test"
    assert page.headings.count("pope") == 1
    assert page.headings.count("On the same questions") == 2
    text = re.sub(r"\s+", " ", page.text.replace("\xa0", " "))
    assert re.search(r"taid scores higher on \d+, Teacher on \d+", text)
    assert re.search(r"taid scores higher on \d+, ce on \d+", text)
    assert re.search(r"Students differ ?\d+ of 40", text)
    assert "Accuracy by step · test" not in text  # the one source needs no name
    assert {"Gallery", "By question type"} <= set(page.headings)


def test_scores_by_different_rules_stand_apart(answered):
    runs = [answered("kit", teacher=None), answered("lmms", teacher=None, rules="lmms-eval")]
    page = read(write_report(runs))
    assert page.headings.count("pope") == 2
    assert "On the same questions" not in page.headings


def test_unpublished_answers_have_no_section(answered):
    run = answered("taid", teacher=None)
    path = run / "evaluation" / "pope" / "student" / "scores.json"
    path.write_text(json.dumps({"benchmark": "pope", "rules": "vlmevalkit", "n": N, "skipped": {}}))
    assert "pope" not in read(write_report([run])).headings


def test_a_score_that_is_none_and_a_scale_of_its_own(answered):
    run = answered("taid")
    for who, main in (("student", None), ("teacher", 1400.0)):
        path = run / "evaluation" / "pope" / who / "scores.json"
        scores = json.loads(path.read_text()) | {"main": main, "out_of": 2800, "judge": 3}
        scores["fallbacks"] = {"random": 2, UNREADABLE: 4}
        path.write_text(json.dumps(scores))
    out = write_report([run])
    text = re.sub(r"\s+", " ", read(out).text)
    assert "1,400.0 of 2800" in text
    assert "– of 2800" in text
    assert "scored without a judge. 3 of 40 answers need one" in text
    assert "4 of the judge's replies could not be parsed" in text
    assert "2 answers were scored by a fallback (random)" in text
    assert 'style="width:50.00%"' in out.read_text()


def test_limits_cut_answers_and_failures_are_marked(answered):
    run = answered("taid")
    for who, change in (
        ("student", {"limited_from": 9000, "cut": 7, "out_of": 40, "main": 20.0}),
        ("teacher", {"failure": "the judge did not answer", "main": None}),
    ):
        path = run / "evaluation" / "pope" / who / "scores.json"
        scores = json.loads(path.read_text()) | change
        path.write_text(json.dumps({key: value for key, value in scores.items() if (key, value) != ("main", None)}))
    out = write_report([run])
    text = re.sub(r"\s+", " ", read(out).text)
    assert "20.0 of 40 limited" in text
    assert "limited to a share of 9,000 questions" in text
    assert "7 answers reached the token limit and were cut" in text
    assert "pope, teacher of taid: the judge did not answer." in text
    assert 'style="width:50.00%"' in out.read_text()
