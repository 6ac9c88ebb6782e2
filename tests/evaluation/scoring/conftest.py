"""The checker of the golden cases, which is a script beside the tests: loaded by path."""

import importlib.util
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]
FILES = sorted((TESTS / "golden" / "scoring").glob("*.jsonl"))


def load(path):
    """A module from a file. (The folder ``tests`` must not go on ``sys.path``: its ``data`` would hide the package.)"""
    name = "_tests_" + path.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def pytest_generate_tests(metafunc):
    if "golden_file" in metafunc.fixturenames:
        metafunc.parametrize("golden_file", FILES, ids=lambda file: file.stem)


@pytest.fixture(scope="session")
def checker():
    return load(TESTS / "check_golden_scoring.py")


@pytest.fixture(scope="session")
def command():
    """The command itself: takes its arguments, returns its exit code."""
    return load(TESTS / "check_golden.py").main
