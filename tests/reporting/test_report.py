"""The report holds what the run folders hold, escapes it, and asks the network for nothing."""

import json
import re
import shutil

import pytest
from page import Page, read

from data.errors import UserError
from vlm_distill.evaluation.predictions import read_predictions
from vlm_distill.evaluation.source_scores import write_answers
from vlm_distill.reporting.gallery import gallery
from vlm_distill.reporting.report import write_report
from vlm_distill.reporting.run_folder import load_run


def test_one_run_has_every_section(make_run):
    path = write_report([make_run()])
    assert path.name == "report.html"
    assert path.parent.name == "taid"
    page = read(path)
    for heading in ("Scores on test", "By question type", "Curves", "Gallery", "Speed and memory", "Configuration"):
        assert heading in page.headings
    assert "On the same questions" not in page.headings
    assert "5.0 %" in page.text  # the student's share of the teacher's parameters
    assert "812.0 MiB" in page.text
    assert "train: image not found" in page.text
    assert page.alts
    assert all(page.alts)


def test_runs_stand_side_by_side_and_are_compared(make_run):
    runs = [make_run("taid"), make_run("ce", taid=False, accuracy=0.6, seed=3)]
    path = write_report(runs, baselines={"Question only": {"n": 40, "exact": 0.5, "soft": 0.5}})
    assert path == runs[0].parent / "report.html"
    page = read(path)
    assert "On the same questions" in page.headings
    assert "Where the runs differ" in page.headings
    assert "Question only" in page.text
    assert "drawn by picture (10)" in re.sub(r"\s+", " ", page.text)
    assert page.text.count("taid.t_start") == 1  # in the table of differences
    assert any(heading.startswith("Students differ") for heading in page.headings)


def test_names_may_be_given_and_equal_folder_names_are_told_apart(make_run, tmp_path):
    first, second = make_run("a/student"), make_run("b/student", seed=2)
    assert "b/student" in read(write_report([first, second], tmp_path / "out.html")).text
    page = read(write_report({"Ours": first, "Theirs": second}, tmp_path / "out.html"))
    assert "Ours" in page.text
    assert "Theirs" in page.text


def test_runs_that_differ_by_their_seed_alone_are_one_training(make_run):
    runs = []
    for name, accuracy in (("good", 0.9), ("bad", 0.5)):
        for seed in range(3):
            run = make_run(f"{name}{seed}", taid=name == "good", accuracy=accuracy, seed=10 * seed + len(name))
            config = run / "config.yaml"
            config.write_text(config.read_text().replace("seed: 0", f"seed: {seed}"))
            runs.append(run)
    page = read(write_report(runs))
    assert "Seeds" in page.headings
    text = re.sub(r"\s+", " ", page.text)
    assert re.search(r"good0 ?bad0 ?\+\d\d\.\d ± \d+\.\d ?better", text)
    # Single questions are compared between one run of each, never between seeds.
    assert text.count("McNemar") == 1


def test_evaluations_stand_beside_runs(make_run, tmp_path):
    run = make_run()
    shutil.copytree(run / "evaluation" / "test" / "teacher", tmp_path / "hub" / "test")
    page = read(write_report([tmp_path / "hub"]))
    assert "By question type" in page.headings
    assert not {"Curves", "Configuration", "How to repeat it"} & {*page.headings}
    page = read(write_report([run, tmp_path / "hub"], tmp_path / "both.html"))
    assert "On the same questions" in page.headings
    assert "Configuration" in page.headings


def test_speeds_of_student_and_teacher_stand_one_below_the_other(make_run):
    text = re.sub(r"\s+", " ", read(write_report([make_run()])).text)
    assert re.search(r"Answers per second on test, student ?581.* ?Answers per second on test, teacher ?96", text)


def test_question_types_no_better_than_a_baseline_are_named(make_run):
    by_type = {"yes/no": {"n": 20, "exact": 0.85}, "colour": {"n": 10, "exact": 0.1}}
    baseline = {"n": 40, "exact": 0.5, "soft": 0.5, "by_type": by_type}
    text = read(write_report([make_run()], baselines={"the question alone": baseline})).text
    assert re.search(r"On yes/no questions, .* is not shown to be better than the question alone \(85.0%\)", text)
    assert "On colour questions" not in text
    assert "“t” is how far TAID’s target has moved" in text


def test_nothing_comes_from_outside(make_run):
    run = make_run()
    text = write_report([run]).read_text("utf-8")
    assert all(address.startswith("data:image/") for address in Page(text).addresses)
    assert not re.search(r"(?i)https?://|url\(|@import|\bfetch\(", text)
    assert len(text) < 500_000


def test_text_from_outside_is_escaped(make_run, questions):
    evil = "<script>alert(1)</script>"
    run = make_run(f"{evil.replace('/', '')}")
    folder = run / "evaluation" / "test" / "student"
    predictions = read_predictions(folder / "predictions.jsonl")
    changed = [
        type(p)(**{**p.__dict__, "question": evil, "references": [evil], "answer": evil, "question_type": evil})
        for p in predictions
    ]
    write_answers(folder, changed)
    write_answers(run / "evaluation" / "test" / "teacher", changed)
    with (run / "config.yaml").open("a") as file:
        file.write(f'note: "{evil}"\n')
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"command": evil, "device": evil, "problems": {evil: 1}, "versions": {evil: evil}, "started": evil}
    summary["answers_per_second"] = {evil: {evil: 1.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "eval", "step": 60, "data": evil, "exact": 0.5, "seconds": 7}) + "\n")
    metrics = (run / "metrics.jsonl").read_text().replace("taid/t", f'taid/{evil}"')
    (run / "metrics.jsonl").write_text(metrics.replace(f'{evil}"":', f'{evil}":'))
    page = read(write_report([run], title=evil))
    assert page.scripts == 1  # our own
    assert page.text.count("alert(1)") > 10  # and all of that is text


def test_what_is_missing_is_left_out(make_run):
    alone = read(write_report([make_run("alone", teacher=None, taid=False)]))
    assert "Teacher" not in alone.text
    assert "Problems in the data" not in alone.headings

    unscored = make_run("unscored", evaluations=0)
    page = read(write_report([unscored]))
    assert "Curves" in page.headings
    assert not any(h.startswith(("Scores", "Gallery")) for h in page.headings)

    (unscored / "summary.json").unlink()
    (unscored / "metrics.jsonl").unlink()
    page = read(write_report([unscored]))
    assert page.headings == ["Distillation report", "Configuration", "How to repeat it"]


def test_a_missing_picture_is_said_not_fatal(make_run, questions):
    run = make_run()
    for _, _, path, _ in questions:
        open(path, "wb").close()
    assert "no picture file" in read(write_report([run])).text


def test_gallery_groups_hold_every_question_once(make_run):
    runs = [load_run(make_run("taid"), "taid", "c0"), load_run(make_run("ce", accuracy=0.6, seed=3), "ce", "c1")]

    class Entry:
        def __init__(self, role, predictions):
            self.role, self.predictions = role, predictions

    entries = [Entry("teacher", runs[0].predictions["test", "teacher"])]
    entries += [Entry("student", run.predictions["test", "student"]) for run in runs]
    groups = gallery(entries)
    assert sum(g["count"] for g in groups) == 40
    for group in groups:
        assert len(group["cards"]) <= 6
        for card in group["cards"]:
            teacher, first, second = (p.exact > 0 for _, p in card)
            assert len({p.index for _, p in card}) == 1
            if group["name"] == "Students differ":
                assert first != second
            if group["name"] == "Teacher right, student wrong":
                assert (teacher, first, second) == (True, False, False)


def test_a_half_written_last_line_is_forgiven_and_others_are_named(make_run):
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    write_report([run])
    path = run / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1: "):
        write_report([run])


@pytest.mark.parametrize("content", ["a: [1", "a: b: c", "\t- x"])
def test_a_damaged_configuration_is_named(make_run, content):
    run = make_run()
    (run / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml") as error:
        write_report([run])
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither a run .* nor an evaluation") as error:
        write_report([tmp_path])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no run given"):
        write_report([])
