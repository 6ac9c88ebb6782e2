"""The report of a run with several teachers: what each taught, and how it scored."""

import json
import re

import pytest

from vlm_distill.reporting.report import write_report


@pytest.fixture
def run(make_run):
    """A run of 20 steps; the teacher ``b`` teaches only in the odd ones, and both are mixed in none."""
    folder = make_run("several", steps=20, teacher=None, teachers={"a": 0.99, "b": 0.5})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            step = line["step"]
            line |= {"teacher/a/share": 0.75, "teacher/b/share": 0.25 * 2 * (step % 2), "teacher/a/taid": step}
            line |= {"teacher/b/taid": 100.0 - step} if step % 2 else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "config.yaml").open("a") as file:
        file.write("teachers:\n  a: {path: x}\n  b: {path: y}\n")
    return folder


def test_shares_and_losses_of_each(run):
    page = write_report([run]).read_text()
    assert "<h2>Teachers</h2>" in page
    shown = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    # Two of twenty steps are a tenth, and of ten steps one.
    assert "a 75.0 % 1.500 → 19.500 b 25.0 % 99.000 → 81.000" in shown
    assert "teacher · b · taid" in page


def test_each_is_scored_by_name(run):
    page = write_report([run]).read_text()
    for label in ("Teacher · a", "Teacher · b"):
        assert label in page
    # With two of them, the headline names no teacher's accuracy.
    assert "; the teacher answers" not in page


def test_a_run_with_one_teacher_has_no_such_section(make_run):
    assert "<h2>Teachers</h2>" not in write_report([make_run()]).read_text()
