"""Files outside the packages that the tests of the losses share, loaded by path."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path):
    """A module from a file. (The folder ``tests`` must not go on ``sys.path``: its ``data`` would hide the package.)"""
    name = "_tests_" + path.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def pytest_generate_tests(metafunc):
    if "golden_case" in metafunc.fixturenames:
        module = load(ROOT / "tests" / "check_golden.py")
        golden = module.Golden(module.GOLDEN / "losses")
        cases = [case for case in golden.cases.values() if module.built(case["loss"])]
        metafunc.parametrize("golden_case", cases, ids=lambda case: case["id"])


@pytest.fixture(scope="session")
def check_golden():
    return load(ROOT / "tests" / "check_golden.py")


@pytest.fixture(scope="session")
def golden(check_golden):
    return check_golden.Golden(check_golden.GOLDEN / "losses")


@pytest.fixture(scope="session")
def benchmark_losses():
    return load(ROOT / "benchmarks" / "losses.py")


@pytest.fixture(scope="session")
def kernels():
    """The cases and helpers of test_kernels.py, for interpreted_kernels.py."""
    return load(ROOT / "tests" / "losses" / "test_kernels.py")


@pytest.fixture(scope="session")
def chunked():
    """The cases and helpers of test_fused_linear.py."""
    return load(ROOT / "tests" / "losses" / "test_fused_linear.py")
