"""A crash at any moment of a save leaves the checkpoints that were whole before, and nothing that passes for one."""

import pytest

from data.errors import UserError
from vlm_distill.training import checkpoint


def save(folder, step, keep=2, write=lambda path: (path / "weights").write_text("w")):
    checkpoint.save(folder, step, write, keep=keep, first=True, gather=lambda text: [text])


def steps(folder):
    return [step for step, _ in checkpoint.completed(folder)]


def test_keeps_the_newest(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert steps(tmp_path) == [10, 100]
    assert (tmp_path / "step_100" / "weights").read_text() == "w"


def test_interrupted_write_leaves_no_checkpoint(tmp_path):
    save(tmp_path, 5)

    def fail(path):
        (path / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 10, write=fail)
    assert steps(tmp_path) == [5]
    save(tmp_path, 10)
    assert steps(tmp_path) == [5, 10]
    assert not list(tmp_path.glob("*.unfinished"))


def test_interrupted_pruning_is_finished_later(tmp_path, monkeypatch):
    save(tmp_path, 5, keep=1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10, keep=1)
    monkeypatch.undo()
    assert steps(tmp_path) == [10]
    save(tmp_path, 15, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_15"]


def test_saved_again_at_the_same_step(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 5, write=lambda path: (path / "weights").write_text("new"))
    assert (tmp_path / "step_5" / "weights").read_text() == "new"


def test_nothing_there(tmp_path):
    assert checkpoint.completed(tmp_path / "none") == []
    assert checkpoint.to_read(tmp_path / "none") is None


def test_only_what_is_read_is_looked_through(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    save(folder, 5)
    (folder / "step_5" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"step_5/link: leads out of the run's folder"):
        checkpoint.to_read(folder)
    save(folder, 10)
    assert steps(folder) == [5, 10]
    assert checkpoint.to_read(folder) == folder / "step_10"
