"""Runs of earlier versions: keys that were added or removed since change nothing, unless they said something."""

from pathlib import Path

import pytest
import yaml

from vlm_distill.config.differences import SEED
from vlm_distill.config.file import load_config, read_saved, save_config
from vlm_distill.config.kinds import kind_of, read_run
from vlm_distill.evaluation.seed_groups import group_by_seed


@pytest.fixture(params=["configs/demo/taid.yaml", "configs/demo/vision/kd.yaml"])
def runs(request, tmp_path):
    """The files of two runs that differ by their seed, as this version writes them."""
    files = [tmp_path / f"seed{seed}" / "config.yaml" for seed in (0, 1)]
    shipped = Path(request.param)
    for seed, file in enumerate(files):
        file.parent.mkdir()
        words = ["loss=[{name: cross_entropy}]", f"{SEED}={seed}"]
        save_config(load_config(shipped, words, kind_of(shipped)), file)
    return files


def make_older(file, removed=False):
    """Take out keys at their defaults, and add some that no longer exist, in sections and in a list."""
    plain = read_saved(file)
    del plain["optimizer"]["momentum"], plain["loss"][0]["weight"]
    plain["data"]["train"][0]["shuffle"] = None
    plain["evaluation"]["plots"] = []
    plain["training"]["profiler"] = removed
    file.write_text(yaml.safe_dump(plain))


def test_keys_that_were_added_or_removed_change_nothing(runs):
    before = read_run(runs[0])
    make_older(runs[0])
    assert read_run(runs[0]) == before
    assert [len(group.members) for group in group_by_seed([file.parent for file in runs])] == [2]


def test_a_removed_key_that_was_on_makes_it_another_run(runs):
    make_older(runs[0], removed=True)
    assert read_run(runs[0])["training"]["profiler"] is True
    assert [len(group.members) for group in group_by_seed([file.parent for file in runs])] == [1, 1]
