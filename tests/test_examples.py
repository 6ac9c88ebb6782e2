"""The notebooks in examples/ run from their first cell to their last."""

import json
import tempfile
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def cells(path):
    """The source of a notebook's code cells."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(cells(path), start=1):
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), namespace)
    assert namespace["scores"]["teacher"] > 0.9
    assert namespace["scores"]["student"] > 0.9
    assert Path(namespace["run"].folder, "report.html").is_file()
