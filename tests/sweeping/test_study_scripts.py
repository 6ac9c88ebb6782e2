"""The scripts of docs/study.md: tables from committed results, figures as files, and the paths of t."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import by_path
import pytest
from run_files import write

from vlm_distill.config.file import load_config, save_config
from vlm_distill.reporting import plots
from vlm_distill.sweeping.record import RecordedRun, SweepRecord

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
study_table, study_figure, taid_paths = (
    by_path.load(ROOT / "benchmarks" / f"{name}.py") for name in ("study_table", "study_figure", "taid_paths")
)


def table(path, baseline):
    """The Markdown rows of a committed CSV."""
    axes, results = study_table.read_results(path)
    runs = [result.run for result in results]
    sweep = SweepRecord("study", path.parent, axes, study_table.find_baseline(axes, results, baseline), runs)
    return list(study_table.lines(sweep, results, "test", "exact"))


def test_the_losses_page_has_the_differences_of_its_committed_results():
    page = (ROOT / "docs" / "losses.md").read_text()
    lines = table(RESULTS / "losses_sweep.csv", "forward_kl")
    assert len(lines) == 23
    for line in lines[2:]:
        name, seeds, _, difference, _ = (cell.strip() for cell in line.split("|")[1:-1])
        assert seeds == "3"
        assert f"| {difference} |" in page or name == "`forward_kl`"


def test_a_baseline_that_the_table_does_not_have_is_refused():
    with pytest.raises(SystemExit, match="no setting 'kd' in this table"):
        table(RESULTS / "losses_sweep.csv", "kd")


def test_a_figure_is_a_file_of_its_own_with_the_names_of_its_lines():
    lines = [plots.Series(name, css, [(0, 1), (1, 2)]) for name, css in (("a & b", "c0"), ("taid", "c1"))]
    chart = str(plots.line_chart("t", lines, x_label="steps"))
    names = {"a & b": "c0", "taid": "c1", "not drawn": "c2"}
    svg = ElementTree.fromstring(study_figure.standalone("t by step", chart, names))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "t by step"
    assert texts[-2:] == ["a & b", "taid"]
    # Colours come along, in both schemes.
    style = svg.findtext("{http://www.w3.org/2000/svg}style")
    assert re.search(r"--c1: #\w+", style)
    assert "prefers-color-scheme: dark" in style


@pytest.mark.parametrize(
    ("lead", "leads", "off_line"), [(0.0, 0.0, 0.0), (0.1, 0.1, 0.5)], ids=["on the line", "ahead of it"]
)
def test_the_path_of_t_is_compared_with_the_line(tmp_path, lead, leads, off_line):
    steps = 20
    run = RecordedRun({"loss": "taid"}, {}, 3, tmp_path / "sweep" / "taid" / "seed3")
    run.folder.mkdir(parents=True)
    config = load_config(write(tmp_path, {"loss": [{"name": "taid", "t_start": 0.2, "schedule": "paper"}]}))
    save_config(config, run.folder / "config.yaml")
    rows = []
    for step in range(steps):
        t = 0.2 + 0.8 * step / steps + (lead if step < steps // 2 else 0.0)
        rows.append({"kind": "train", "step": step + 1, "taid/t": t})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = taid_paths.row_of(run)
    assert (found["sweep"], found["setting"], found["seed"]) == ("sweep", "taid", 3)
    assert (found["schedule"], found["t_start"], found["steps"]) == ("paper", 0.2, steps)
    assert (found["leads"], found["trails"], found["off_line"]) == (leads, 0.0, off_line)
    assert found["t_100%"] == pytest.approx(0.96)


def test_a_run_without_taid_has_no_path(tmp_path):
    config = load_config(write(tmp_path, {"loss": [{"name": "forward_kl"}]}))
    save_config(config, tmp_path / "config.yaml")
    assert taid_paths.row_of(RecordedRun({}, {}, 0, tmp_path)) is None
