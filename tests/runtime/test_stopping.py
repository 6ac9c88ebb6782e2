"""Signals are noted, and end the process at once only where nothing can be lost, or on a second Ctrl-C."""

import os
import signal

import pytest

from vlm_distill.runtime import stopping, watchdog
from vlm_distill.runtime.stopping import Stopping
from vlm_distill.runtime.watchdog import Watch


@pytest.fixture(autouse=True)
def _leaving_raises(monkeypatch):
    def leave(code):
        raise SystemExit(code)

    for module in (stopping, watchdog):
        monkeypatch.setattr(module, "leave", leave)


def send(number):
    os.kill(os.getpid(), number)


def test_noted_and_told_once(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with Stopping(Watch(0, 1, 60.0)) as stop:
        assert not stop.asked
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.asked
    assert capsys.readouterr().err.count("stopping: finishing") == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(
    ("number", "setting", "code"), [(signal.SIGTERM, None, 143), (signal.SIGINT, None, 130), (signal.SIGTERM, 0, 0)]
)
def test_ends_at_once_where_the_checkpoint_is_written(early, number, setting, code, capsys):
    def told_to_stop(stop):
        if early:
            send(number)
        with stop.at_once():
            send(number)
            pytest.fail("went on")

    with Stopping(Watch(0, 1, 60.0), setting) as stop, pytest.raises(SystemExit) as left:
        told_to_stop(stop)
    assert left.value.code == code
    assert "start the run again" in capsys.readouterr().err


def test_goes_on_after_what_may_be_broken_off():
    with Stopping(Watch(0, 1, 60.0)) as stop:
        with stop.at_once():
            pass
        send(signal.SIGTERM)
        assert stop.asked


def test_second_interrupt_ends_at_once(monkeypatch):
    with Stopping(Watch(0, 1, 60.0)) as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)  # the terminal's and the launcher's: one Ctrl-C
        assert stop.asked
        monkeypatch.setattr(stopping, "_ONCE_MORE", -1.0)
        with pytest.raises(SystemExit) as left:
            send(signal.SIGINT)
    assert left.value.code == 128 + signal.SIGINT
