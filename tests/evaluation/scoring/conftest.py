"""The checker of the golden cases, which is a script beside the tests: loaded by path."""

from pathlib import Path

import pytest
from by_path import load

TESTS = Path(__file__).resolve().parents[2]
FILES = sorted((TESTS / "golden" / "scoring").glob("*.jsonl"))


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
