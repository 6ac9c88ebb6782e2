"""What a sweep's tables, page, figures, CSV and LaTeX show of runs whose scores are known."""

import csv
import random
import re

import pytest
import sweep_runs
import yaml
from page import Page, read
from run_files import write

from data.errors import UserError
from vlm_distill.evaluation.seed_statistics import compare_seeds
from vlm_distill.sweeping.grid import read_sweep
from vlm_distill.sweeping.latex import latex_tables
from vlm_distill.sweeping.page import write_sweep
from vlm_distill.sweeping.record import read_record, record_of, write_record
from vlm_distill.sweeping.results import read_results
from vlm_distill.sweeping.table import rows_of

LOSSES = {
    "cross_entropy": {"teacher": None, "loss": [{"name": "cross_entropy"}]},
    "taid": {},
    "kl": {"loss.0.name": "forward_kl"},
}
TEACHERS = {"0.1m": {"teacher.path": "a"}, "4m": {"teacher.path": "b"}}
GAIN = {"cross_entropy": 0.0, "taid": 0.1, "kl": 0.002}


@pytest.fixture
def make(tmp_path):
    """Writes the finished runs of a sweep; gives what its folder says of itself."""

    def make(axes=None, *, seeds=4, answers=False, finished=None, name="my_study"):
        write(tmp_path, {"loss": [{"name": "taid"}]})
        axes = {"teacher": TEACHERS, "loss": LOSSES} if axes is None else axes
        plain = {"config": "run.yaml", "output": str(tmp_path / "runs")}
        plain |= {"axes": axes | {"training.seed": list(range(seeds))}}
        path = tmp_path / f"{name}.yaml"
        plain |= {"baseline": "cross_entropy"} if "loss" in axes else {}
        path.write_text(yaml.safe_dump(plain, sort_keys=False))
        sweep, rng = read_sweep(path), random.Random(0)
        for number, run in enumerate(sweep.distinct[:finished]):
            gain = GAIN.get(run.setting.get("loss"), 0.0)
            sweep_runs.finish(run, 0.7 + gain + 0.002 * (number**2 * 7 % 11 - 5), seconds=60 + run.seed)
            if answers:
                sweep_runs.add_answers(run, rng)
        record = record_of(sweep)
        write_record(record)
        return record

    return make


def text_of(page):
    return re.sub(r"\s+", " ", page.text)


def test_settings_are_compared_with_their_baseline_seed_by_seed(make):
    sweep = make()
    rows = {row.setting: row for row in rows_of(sweep, read_results(sweep), "test", "exact")}
    assert len(rows) == 6
    for teacher in TEACHERS:
        row, base = rows[teacher, "taid"], rows[teacher, "cross_entropy"]
        assert row.against == compare_seeds(row.values, base.values, of=4)
        assert row.against.n == 4
        assert row.verdict == "better"
        assert base.against is None
        assert rows[teacher, "kl"].verdict == "no difference shown"
    assert rows["0.1m", "cross_entropy"].values == rows["4m", "cross_entropy"].values
    assert "2 are shown to be better and none to be worse." in text_of(read(write_sweep(sweep)))


def test_lower_is_better_for_perplexity(make):
    sweep = make()
    for run in sweep.runs:
        folder = run.folder / "evaluation/texts/student"
        folder.mkdir(parents=True, exist_ok=True)
        value = 9 + 0.01 * run.seed - 3 * (run.setting["loss"] == "taid")
        (folder / "scores.json").write_text(
            f'{{"measures": ["perplexity"], "n": 5, "exact": 0.1, "perplexity": {value}}}'
        )
    results = read_results(sweep)
    assert rows_of(sweep, results, "texts", "perplexity")[1].verdict == "better"
    assert ("texts", "exact") not in results[0].scores


def test_the_page_shows_everything_and_asks_nobody(make):
    path = write_sweep(make(answers=True))
    text = path.read_text("utf-8")
    page = read(path)
    assert page.headings[:2] == ["My study", "Accuracy, % · test"]
    assert page.headings.count("All pairs · 0.1m") == 1
    assert "Curves" in page.headings
    shown = text_of(page)
    assert "2 choices of teacher, 3 choices of loss, 4 seeds: 20 runs." in shown
    assert "of 4 settings compared with cross_entropy, none is shown to be better or worse." in shown
    assert "over questions too" in shown
    assert "1 min 02 s" in shown
    assert "no difference shown" in shown
    assert page.scripts == 1
    assert page.addresses == []
    assert not re.search(r"(?i)https?://|url\(|@import|\bfetch\(", text)
    assert len(text) < 300_000


def test_figures_draw_scores_against_numbers_with_bands(make):
    text = write_sweep(make(answers=True)).read_text("utf-8")
    charts = re.findall(r"<figure.*?</figure>", text, re.S)
    by_teacher, differences = [chart for chart in charts if "by teacher" in chart]
    assert 'data-log="1"' in by_teacher
    assert [by_teacher.count(f'class="{kind}') for kind in ("band", "line")] == [3, 3]
    assert re.findall(r'data-label="(\w+)"', by_teacher) == list(LOSSES)
    assert "Accuracy, %: difference from cross_entropy by teacher" in differences
    assert [differences.count(f'class="{kind}') for kind in ("band", "line")] == [2, 2]
    curves = [chart for chart in charts if "by step" in chart]
    # Accuracy and TAID's t beside each teacher.
    assert len(curves) == 4
    assert all('class="band' in chart for chart in curves)


def test_pairs_are_turned_round_below_the_diagonal(make):
    from vlm_distill.sweeping.page import _matrices

    sweep = make()
    for matrix in _matrices(sweep, rows_of(sweep, read_results(sweep), "test", "exact"), lower=False):
        assert list(matrix.names) == list(LOSSES)
        there, back = matrix.cells["taid", "kl"], matrix.cells["kl", "taid"]
        assert (there[1], back[1]) == ("better", "worse")
        assert there[0].replace("+", "−") == back[0]


def test_a_sweep_of_one_number_is_one_line(make):
    path = write_sweep(make({"optimizer.lr": [1e-4, 1e-3, 1e-2]}))
    (chart,) = re.findall(r"<figure.*?</figure>", path.read_text("utf-8"), re.S)
    assert "Accuracy, % by optimizer.lr" in chart
    assert chart.count('class="line') == 1


def test_too_many_settings_show_the_baseline_and_the_best(make):
    losses = {"cross_entropy": LOSSES["cross_entropy"]} | {f"t{k}": {"loss.0.t_start": k / 20} for k in range(12)}
    sweep = make({"loss": losses}, answers=True, seeds=2)
    text = write_sweep(sweep).read_text("utf-8")
    curves = [chart for chart in re.findall(r"<figure.*?</figure>", text, re.S) if "Accuracy by step" in chart]
    labels = re.findall(r'data-label="(\w+)"', curves[0])
    assert len(labels) == 8
    assert "cross_entropy" in labels
    assert "All pairs" not in text


def test_an_unfinished_sweep_shows_what_there_is(make, tmp_path):
    page = read(write_sweep(make(finished=7)))
    assert "20 runs, 7 of them finished" in text_of(page)
    with pytest.raises(UserError, match="no run of this sweep is finished"):
        write_sweep(make({"loss": LOSSES}, finished=0, name="other"))


def test_a_moved_folder_is_reported(make, tmp_path, command):
    make()
    moved = tmp_path / "elsewhere"
    (tmp_path / "runs").rename(moved)
    code, said, _ = command("report", moved)
    assert (code, said) == (0, f"{moved / 'sweep.html'}\n")
    assert read_record(moved).runs[0].folder == moved / "0.1m,cross_entropy/seed0"
    with (moved / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert rows[1]["loss"] == "taid"
    assert float(rows[1]["test.exact"]) > 0.75
    assert rows[1]["test.kind.exact"] == rows[1]["test.exact"]
    assert rows[1]["teacher_parameters"] == "2000"


def test_a_damaged_record_is_one_line(make, tmp_path):
    make()
    (tmp_path / "runs/sweep.json").write_text('{"title": "x", "axes": [], "baseline": null, "runs": [{}]}')
    with pytest.raises(UserError, match=r"sweep.json: runs.0.setting is damaged"):
        read_record(tmp_path / "runs")


def test_latex_escapes_names_and_marks_what_is_shown(make):
    sweep = make()
    text = latex_tables(sweep, read_results(sweep))
    assert text.count(r"\begin{tabular}{llrrr}") == 1
    assert r"cross\_entropy" in text
    assert len(re.findall(r"\\textbf\{\$\+\d+\.\d+ \\pm \d+\.\d+\$\}", text)) == 2
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in lines} == {4}
    assert not re.search(r"(?<!\\)%|−|±", text)


def test_names_are_escaped_on_the_page(make):
    path = write_sweep(make(name="<script>alert(1)<"))
    page = Page(path.read_text("utf-8"))
    assert page.scripts == 1
    assert "alert(1)" in page.text
