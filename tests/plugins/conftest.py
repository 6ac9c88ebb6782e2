"""A working directory with plug-ins, and registers that forget."""

import sys

import pytest
from outside import LOSSES, module

from data import plugin_layouts
from vlm_distill import losses
from vlm_distill.evaluation import benchmark_lookup
from vlm_distill.models import families


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with modules of the user's own, which the path does not have, as under ``vlm-distill``."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    module(tmp_path / "my_losses.py", LOSSES)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    for plugins in (losses.PLUGINS, plugin_layouts.PLUGINS, benchmark_lookup.PLUGINS, families.PLUGINS):
        monkeypatch.setattr(plugins, "_registered", {})
