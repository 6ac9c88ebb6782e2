"""A crash at any moment of a save leaves whole checkpoints alone; a damaged one is named and the one before is used."""

import json
import shutil

import pytest

from data.errors import UserError
from vlm_distill.runtime import manifest
from vlm_distill.training import checkpoint


def fill(path, text="w"):
    (path / "engine").mkdir()
    (path / "engine" / "weights").write_text(text * 100)
    (path / "run.json").write_text("{}")
    return {}


def save(folder, step, keep=2, write=fill):
    checkpoint.save(folder, step, write, keep=keep, first=True, gather=lambda text: [text])


def steps(folder):
    return [step for step, _ in checkpoint.completed(folder)]


def test_keeps_the_newest(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert steps(tmp_path) == [10, 100]
    assert checkpoint.find(tmp_path) == checkpoint.Found(tmp_path / "step_100", {})


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
    save(tmp_path, 5, write=lambda path: fill(path, "new"))
    assert (tmp_path / "step_5" / "engine" / "weights").read_text().startswith("new")
    assert checkpoint.find(tmp_path) == checkpoint.Found(tmp_path / "step_5", {})


def test_nothing_there(tmp_path):
    assert checkpoint.completed(tmp_path / "none") == []
    assert checkpoint.find(tmp_path / "none") is None
    (tmp_path / "step_5").write_text("a file")
    assert checkpoint.find(tmp_path) is None


def test_only_what_is_read_is_looked_through(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    save(folder, 5)
    (folder / "step_5" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"step_5/link: leads out of the run's folder"):
        checkpoint.find(folder)
    save(folder, 10)
    assert steps(folder) == [5, 10]
    assert checkpoint.find(folder).path == folder / "step_10"


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "a file is gone": (lambda folder: (folder / "engine/weights").unlink(), "engine/weights: missing"),
    "a file is cut": (lambda folder: cut(folder / "engine/weights"), "engine/weights: 50 bytes instead of 100"),
    "a file is empty": (lambda folder: (folder / "engine/weights").write_text(""), "0 bytes instead of 100"),
    "a file is a folder": (lambda folder: [(folder / "run.json").unlink(), (folder / "run.json").mkdir()], "missing"),
    "a byte is flipped": (lambda folder: flip(folder / "engine/weights"), "engine/weights: its content has changed"),
    "its own record is flipped": (lambda folder: flip(folder / "run.json"), "run.json: its content has changed"),
    "all files are gone": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "manifest.json: missing"),
    "the manifest is gone": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing"),
    "the manifest is cut": (lambda folder: cut(folder / "manifest.json"), "manifest.json: not readable as JSON"),
    "the manifest is empty": (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json: not readable"),
    "the manifest is a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "not a JSON object"),
    "the manifest has no files": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 1}'),
        "has no files",
    ),
    "its entries are odd": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 1, "files": {"a": {"bytes": 1}}}'),
        "no size or no checksum",
    ),
    "a later version wrote it": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 2, "files": {}}'),
        "later version",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    spoil, words = DAMAGES[damage]
    save(tmp_path, 5)
    save(tmp_path, 10)
    spoil(tmp_path / "step_10")
    found = checkpoint.find(tmp_path)
    assert found.path == tmp_path / "step_5"
    assert words in found.damaged[tmp_path / "step_10"]
    spoil(tmp_path / "step_5")
    with pytest.raises(UserError, match="no checkpoint is intact") as caught:
        checkpoint.find(tmp_path)
    assert str(caught.value).count(words) == 2


def test_every_flipped_byte_is_noticed(tmp_path):
    save(tmp_path, 5)
    for path in (tmp_path / "step_5" / "engine" / "weights", tmp_path / "step_5" / "manifest.json"):
        good = path.read_bytes()
        content = manifest.read(tmp_path / "step_5")
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            try:
                checkpoint.find(tmp_path)
            except UserError:
                continue
            assert manifest.read(tmp_path / "step_5") == content  # white space
        path.write_bytes(good)


def test_files_beside_those_of_the_manifest_do_not_matter(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "step_5" / ".nfs0001").write_text("left by a file system")
    assert not checkpoint.find(tmp_path).damaged


def test_every_rank_reads_its_share_and_all_agree(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10)
    flip(tmp_path / "step_10" / "run.json")
    # One rank alone finds the fault in its share; what the other found is what gather says.
    faults = [checkpoint._fault(tmp_path / "step_10", rank, 2) for rank in range(2)]
    assert [fault is None for fault in faults] == [True, False]
    answers = iter([["step_5", "step_10"], faults[1], None])
    found = checkpoint.find(tmp_path, rank=0, world=2, gather=lambda mine: [mine, next(answers)])
    assert found.path == tmp_path / "step_5"


def test_pruning_never_prefers_a_damaged_one(tmp_path):
    save(tmp_path, 5, keep=1)
    (tmp_path / "step_20").mkdir()
    checkpoint.set_aside(checkpoint.find(tmp_path).damaged)
    assert (tmp_path / "step_20.damaged").is_dir()
    (tmp_path / "step_30").mkdir()  # not even one that appears meanwhile
    save(tmp_path, 10, keep=1)
    assert steps(tmp_path) == [10, 30]
    assert checkpoint.find(tmp_path).path == tmp_path / "step_10"


def test_what_is_hashed_while_it_is_written_is_what_lies_on_the_disk(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        hashed = manifest.HashedWriter(file)
        for part in (b"ab", memoryview(bytearray(5000)), b""):
            hashed.write(part)
    assert hashed.entry == manifest.hash_file(tmp_path / "file")


def best(folder, score=0.5):
    checkpoint.save_best(folder, fill, {"step": 4, "score": score, "name": "questions"})


@pytest.mark.parametrize("name", ["best.json", "engine/weights", "manifest.json"])
def test_a_damaged_best_student_is_not_compared_with(tmp_path, name):
    best(tmp_path / "best")
    assert checkpoint.best_score(tmp_path / "best", {"name": "questions"}, 4) == 0.5
    cut(tmp_path / "best" / name)
    with pytest.raises(UserError, match=name):
        checkpoint.best_score(tmp_path / "best", {"name": "questions"}, 4)


def test_a_best_student_without_a_score_is_told_in_one_line(tmp_path):
    best(tmp_path / "best")
    (tmp_path / "best" / "best.json").write_text(json.dumps({"step": "four"}))
    manifest.write(tmp_path / "best")
    with pytest.raises(UserError, match="has no score"):
        checkpoint.best_score(tmp_path / "best", {}, 4)
