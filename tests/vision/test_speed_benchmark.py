"""The benchmark of a step runs, its sides agree on the losses, and its table has a row for each."""

import csv
from pathlib import Path

import pytest
import torch
from by_path import load

speed = load(Path(__file__).resolve().parents[2] / "benchmarks/vision_speed.py")


@pytest.mark.parametrize("kind", ["step", "loop"])
def test_every_side_has_a_row(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "JPEGS", 8)
    threads = torch.get_num_threads()
    case = speed.Case("cifar_resnet8", "cifar_resnet8", 32, batch=2, classes=3, kind=kind, channels_last=True)
    try:
        speed.main(["--rounds", "2", "--output", str(tmp_path / "speed.csv")], [case])
    finally:
        torch.set_num_threads(threads)
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert [row["side"] for row in rows] == (["ours", "plain", "timm"] if kind == "step" else ["ours", "timm"])
    assert all(float(row["seconds"]) > 0 and float(row["over_ours"]) > 0 for row in rows)
    assert rows[0]["over_ours"] == "1.0"


def test_sides_that_learn_different_things_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(speed.Bench, "plain", lambda self: 2 * self.ours())
    case = speed.Case("cifar_resnet8", "cifar_resnet8", 32, batch=2, classes=3)
    with pytest.raises(SystemExit, match="losses differ in step 0"):
        speed.main(["--rounds", "1", "--output", str(tmp_path / "speed.csv")], [case])
