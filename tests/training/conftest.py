"""What the tests of training share."""

import pytest
from metric_table import metrics_are_in_the_table  # noqa: F401

from vlm_distill.runtime.processes import Processes


@pytest.fixture(scope="module")
def processes():
    opened = Processes("cpu")
    yield opened
    opened.close()
