"""A file is one process's at a time, and nobody's as soon as that has ended, however it did."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_distill.runtime.lock import Taken, hold, holder

HOLDS = """
import subprocess, sys
from pathlib import Path
from vlm_distill.runtime.lock import hold

held = hold(Path(sys.argv[1]))
# One that it started, as workers are, and that lives on.
other = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=[held.fileno()])
print(other.pid, flush=True)
input()
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds ``tmp_path / "lock"``."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", HOLDS, str(tmp_path / "lock")]
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process, int(process.stdout.readline())
        process.kill()


def test_the_other_is_named_and_one_that_was_killed_holds_nothing(other, tmp_path):
    path, (process, started) = tmp_path / "lock", other
    who = f"process {process.pid} on {socket.gethostname()}"
    for _ in range(2):
        with pytest.raises(Taken, match=f"^{who}$"):
            hold(path)
        assert holder(path) == who
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(started, 0)
    assert holder(path) is None
    hold(path).close()
    assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    os.kill(started, signal.SIGKILL)


def test_nobody_holds_a_file_that_is_not_there(tmp_path):
    assert holder(tmp_path / "lock") is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        hold(tmp_path / "none/lock")


def test_a_file_system_without_locks_gives_it_to_everyone(other, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    assert holder(tmp_path / "lock") is None
    hold(tmp_path / "lock").close()
