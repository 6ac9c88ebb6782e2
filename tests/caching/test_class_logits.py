"""A teacher's logits on disk: what was written is read, and logits of anything else are refused."""

import json
import shutil
import subprocess
import sys
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch

from data.errors import UserError
from vlm_distill.caching.class_logits import LogitCache
from vlm_distill.caching.store import fingerprint

IDENTITY = {"teacher": "abc", "seed": "0"}


@pytest.fixture
def cache(tmp_path):
    def make(identity=IDENTITY, sources=None, views=2, categories=5, folder="cache"):
        sources = {"a": 4, "b": 3} if sources is None else sources
        return LogitCache(tmp_path / folder, sources, views, categories, identity)

    return make


def sample(rows, view=0):
    rows = torch.tensor(rows)
    generator = torch.Generator().manual_seed(view)
    return rows, view, rows * 10 + 4_000_000_000 + view, torch.randn(len(rows), 5, generator=generator)


def test_what_is_written_is_read_by_another(cache):
    rows, view, checks, logits = sample([6, 0, 3], 1)
    cache().write(rows, view, checks, logits)
    other = cache()
    assert torch.equal(other.read(rows, view, checks), logits)
    assert torch.equal(other.read(rows.flip(0), view, checks.flip(0)), logits.flip(0))
    assert other.read(rows, 0, checks - 1) is None


def test_none_unless_all_rows_are_there(cache):
    half = cache()
    rows, view, checks, logits = sample([0, 1, 2, 3])
    half.write(rows[:2], view, checks[:2], logits[:2])
    assert half.read(rows, view, checks) is None
    # Resumed later, by another process.
    rest = cache()
    rest.write(rows[2:], view, checks[2:], logits[2:])
    assert torch.equal(half.read(rows, view, checks), logits)


def test_half_precision_and_no_rows(cache):
    rows, view, checks, logits = sample([2])
    cache().write(rows, view, checks, logits.bfloat16().requires_grad_())
    assert torch.equal(cache().read(rows, view, checks), logits.bfloat16().float())
    nothing = rows[:0]
    cache().write(nothing, 0, nothing, logits[:0])
    assert cache().read(nothing, 0, nothing).shape == (0, 5)


def test_a_view_that_changed_is_refused_with_its_place(cache):
    rows, view, checks, logits = sample([2, 5])
    cache().write(rows, view, checks, logits)
    checks[1] += 1
    with pytest.raises(UserError, match=r"^b, sample 2, view 0: .*delete that folder") as caught:
        cache().read(rows, view, checks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["logits", "checks"])
def test_a_row_that_a_crash_tore_is_not_there(cache, tmp_path, file):
    rows, view, checks, logits = sample([2, 5])
    cache().write(rows, view, checks, logits)
    # The flag reached the disk, but these did not.
    array = np.lib.format.open_memmap(tmp_path / f"cache/{file}.npy", mode="r+")
    array[5 * 2] = 0
    del array
    assert cache().read(rows, view, checks) is None
    assert cache().read(rows[:1], view, checks[:1]) is not None


def test_a_file_cut_short_has_lost_its_last_rows(cache, tmp_path):
    rows, view, checks, logits = sample([0, 6])
    cache().write(rows, view, checks, logits)
    path = tmp_path / "cache/logits.npy"
    path.write_bytes(path.read_bytes()[:-30])
    assert cache().read(rows, view, checks) is None
    assert torch.equal(cache().read(rows[:1], view, checks[:1]), logits[:1])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"identity": IDENTITY | {"teacher": "abd"}}, "another teacher: abc there, abd here"),
        ({"identity": {"teacher": "abc"}}, "another seed: 0 there, none here"),
        ({"identity": IDENTITY | {"dtype": "bfloat16"}}, "another dtype: none there, bfloat16 here"),
        ({"sources": {"a": 4, "b": 4}}, r"another sources: a \(4 rows\), b \(3 rows\) there, a \(4 rows\), b \(4"),
        ({"views": 3}, "another views: 2 there"),
        ({"categories": 6}, "another categories: 5 there"),
    ],
)
def test_logits_of_something_else_are_refused(cache, change, key):
    cache()
    with pytest.raises(UserError, match=key) as caught:
        cache(**change)
    assert "\n" not in str(caught.value)


def test_broken_files_are_refused_by_name(cache, tmp_path):
    cache()
    folder = tmp_path / "cache"
    for content in (b"", b"PK", np.lib.format.magic(1, 0)):
        (folder / "logits.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"logits\.npy: cannot be read: .*delete the folder"):
            cache()
    np.save(folder / "logits.npy", np.zeros((14, 5)))
    with pytest.raises(UserError, match=r"logits\.npy: float64 \(14, 5\) is not float32"):
        cache()
    np.save(folder / "logits.npy", np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"logits\.npy"):
        cache()
    (folder / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache\.json: not readable as JSON"):
        cache()
    (folder / "cache.json").write_text("[]")
    with pytest.raises(UserError, match=r"cache\.json: not a JSON object"):
        cache()


def test_a_folder_with_something_else_in_it_is_left_alone(cache, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="name an empty folder"):
        cache()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name an empty folder"):
        cache(folder="file")
    with pytest.raises(UserError, match="name an empty folder"):
        cache(folder="file/cache")


def test_no_room_is_said_before_the_first_row(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(100))
    with pytest.raises(UserError, match="make room"):
        cache()
    assert list(tmp_path.iterdir()) == []


def test_many_open_it_at_once_and_all_share_it(cache, tmp_path):
    made, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        made.append(cache())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows, view, checks, logits = sample([1])
    made[0].write(rows, view, checks, logits)
    assert len(made) == 8
    assert all(torch.equal(one.read(rows, view, checks), logits) for one in made)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


WRITER = """
import sys, torch
from pathlib import Path
from vlm_distill.caching.store import fingerprint
from vlm_distill.caching.class_logits import LogitCache
cache = LogitCache(Path(sys.argv[1]), {"a": 400}, 1, 5, {"seed": "0"})
for row in range(int(sys.argv[2]), 400, 2):
    rows = torch.tensor([row])
    cache.write(rows, 0, rows, torch.full((1, 5), float(row)))
"""


def test_two_processes_write_disjoint_rows(tmp_path):
    folder = str(tmp_path / "cache")
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, folder, str(rank)]) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    cache = LogitCache(tmp_path / "cache", {"a": 400}, 1, 5, {"seed": "0"})
    rows = torch.arange(400)
    assert torch.equal(cache.read(rows, 0, rows), rows[:, None].expand(400, 5).float())


def test_the_size_is_what_the_docstring_says(cache, tmp_path):
    cache(sources={"a": 1000}, views=3, categories=100)
    files = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.npy"))
    assert files == 3000 * (4 * 100 + 9) + 3 * 128
    assert json.loads((tmp_path / "cache/cache.json").read_text())["views"] == "3"


def test_a_fingerprint_tells_names_shapes_types_and_bytes_apart():
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3), "c": torch.zeros(0), "d": torch.zeros(2, 2)}
    base = fingerprint(state)
    assert base == fingerprint(dict(reversed(state.items())))
    # A golden value: later versions compare caches by it.
    assert base == "b4a4dac3da4781b0df11aa5ec9676a2b775b03796e31f4724cfc5790cec08467"
    for change in (
        {"a": torch.tensor([1.0, 2.5])},
        {"a": torch.tensor([1.0, 2.0]).bfloat16()},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"e": torch.zeros(1)},
    ):
        assert fingerprint(state | change) != base
    assert fingerprint({"d": torch.arange(4.0).reshape(2, 2).t()}) != fingerprint(
        {"d": torch.arange(4.0).reshape(2, 2)}
    )
