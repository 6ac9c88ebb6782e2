"""Files outside the packages that the tests of the losses share, loaded by path."""

from pathlib import Path

import pytest
from by_path import load

ROOT = Path(__file__).resolve().parents[2]


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
