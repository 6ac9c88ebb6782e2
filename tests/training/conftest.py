"""What the tests of training share."""

import pytest

from vlm_distill.runtime.processes import Processes


@pytest.fixture(scope="module")
def processes():
    opened = Processes("cpu")
    yield opened
    opened.close()
