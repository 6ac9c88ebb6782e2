"""One command at a time fills a cache; a second one, and a run that would read it, name the first in one line."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import held_fill
import pytest
import tiny
import yaml

from data.errors import UserError
from vlm_distill.caching.fill import fill
from vlm_distill.caching.image_features import FeatureCache
from vlm_distill.caching.store import filling
from vlm_distill.caching.token_records import TokenCache
from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.launch import launch
from vlm_distill.trainer import Trainer

KEYS = ["teacher.cache", "student.vision_cache"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    tiny.write_data(folder, rows=10)
    tiny.write_teacher(folder / "teacher")
    tiny.write_student(folder / "student")
    return folder


def configured(material, folder, key):
    """A configuration with one cache, ``folder / "cache"``, and the file that it is in."""
    plain = tiny.config(folder / "run", material / "data.jsonl", material / "teacher")
    if key == "teacher.cache":
        plain["teacher"]["cache"] = {"folder": str(folder / "cache")}
    else:
        plain["student"] = {"path": str(material / "student"), "train": ["projector", "decoder"]}
        plain["student"]["vision_cache"] = str(folder / "cache")
    (folder / "run.yaml").write_text(yaml.safe_dump(plain))
    return RunConfig.model_validate(plain), folder / "run.yaml"


@contextmanager
def other_command(path):
    """A command that has written part of a configuration's cache, and waits."""
    paths = os.pathsep.join(map(str, [Path(__file__).parents[2], Path(__file__).parent]))
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, held_fill.__file__, str(path)]
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "filling\n"
        yield process
        process.kill()


@pytest.mark.parametrize("key", [KEYS[0], pytest.param(KEYS[1], marks=pytest.mark.slow)])
def test_a_second_command_and_a_run_end_with_who_fills_it(material, processes, tmp_path, key):
    config, path = configured(material, tmp_path, key)
    with other_command(path) as other:
        who = rf"{key}: .*cache: process {other.pid} on {socket.gethostname()} is filling it; "
        with pytest.raises(UserError, match=who + "wait for it, or stop it and run vlm-distill cache again"):
            fill(config, processes)
        with pytest.raises(UserError, match=who + "start the run when that is done"):
            Trainer(config, processes)
        other.send_signal(signal.SIGKILL)
        other.wait()
    fill(config, processes)
    assert len(list((tmp_path / "cache").glob("*.index"))) == 2
    list(Trainer(config, processes).batches(0, 2))


def test_one_that_is_let_go_on_fills_it_all(material, processes, tmp_path):
    config, path = configured(material, tmp_path, KEYS[0])
    with other_command(path) as other:
        with pytest.raises(UserError, match="is filling it"):
            fill(config, processes)
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.wait() == 0
    assert not TokenCache(tmp_path / "cache").missing()
    assert len(list((tmp_path / "cache").glob("*.index"))) == 1


@pytest.mark.slow
def test_a_second_command_of_two_ranks_says_it_once(material, tmp_path, capfd):
    _, path = configured(material, tmp_path, KEYS[1])
    with other_command(path) as other:
        assert launch("vlm_distill.cache", [str(path)], 2) == 2
        told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vlm-distill")]
        assert len(told) == 1
        assert f"process {other.pid} on " in told[0]


def test_a_folder_under_another_name_is_the_same(tmp_path):
    """Even before it exists."""
    (tmp_path / "caches").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "caches/a")
    with filling(tmp_path / "mine", "x"), filling(tmp_path / "caches/b", "x"):
        assert sorted(path.name for path in (tmp_path / "caches").iterdir()) == [".a.lock", ".b.lock"]


def test_where_no_lock_can_be_it_is_filled_all_the_same(material, processes, tmp_path, monkeypatch):
    def none(_):
        raise PermissionError

    monkeypatch.setattr("vlm_distill.caching.store.hold", none)
    config, _ = configured(material, tmp_path, KEYS[1])
    fill(config, processes)
    assert len(FeatureCache(tmp_path / "cache")) == 5


def test_ranks_that_see_different_rows_missing_do_not_begin(material, processes, tmp_path, monkeypatch):
    """As without file locks, while another command writes."""
    config, _ = configured(material, tmp_path, KEYS[0])
    monkeypatch.setattr(processes, "gather", lambda missing: [missing, missing - 1])
    with pytest.raises(UserError, match="cache: another command is filling it; wait for it or stop it"):
        fill(config, processes)
    assert not list((tmp_path / "cache").glob("*.data"))
