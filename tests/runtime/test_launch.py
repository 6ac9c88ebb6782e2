"""The port at which the ranks of a launch meet, and how commands end that are told to stop."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from vlm_distill import demo
from vlm_distill.runtime import launch
from vlm_distill.runtime.launch import guarded, reserved_port


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port is free again before ranks name it")
def test_a_reserved_port_is_the_ranks_alone():
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use") as refused:
            other.bind(("127.0.0.1", port))
        assert refused.value.errno == errno.EADDRINUSE
        limit = timedelta(seconds=10)
        first = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=limit)
        TCPStore("127.0.0.1", port, is_master=False, timeout=limit).set("rank 1", "here")
        assert first.get("rank 1") == b"here"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_told_to_stop_says_so_and_leaves_in_order(number, capsys):
    left = []

    def command():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            left.append("in order")

    before = signal.getsignal(number)
    assert guarded(command) == 128 + number
    assert left == ["in order"]
    assert capsys.readouterr().err == "vlm-distill: stopped; start the command again to continue from what is saved\n"
    assert signal.getsignal(number) is before


def test_the_demo_stops_in_the_stage_that_it_is_in(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(demo, "prepare", lambda folder: folder)
    monkeypatch.setattr(demo, "launch", lambda module, words, nproc: started.append(words) or 130)
    with pytest.raises(SystemExit) as left:
        demo.run(tmp_path, 1)
    assert left.value.code == 130
    assert len(started) == 1


def test_of_ranks_that_end_together_the_killed_one_is_named(capfd):
    broken = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    killed = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    for process in (broken, killed):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert launch._wait([broken, killed]) == 128 + signal.SIGKILL
    assert "rank 1" in capfd.readouterr().err
