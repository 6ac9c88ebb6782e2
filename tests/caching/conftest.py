"""What the tests of caches share: one rank, and a tiny processor."""

import pytest
from characters import CharacterProcessor

from vlm_distill.runtime.processes import Processes


@pytest.fixture(scope="module")
def processes():
    opened = Processes("cpu")
    yield opened
    opened.close()


@pytest.fixture
def processor():
    """Return the class of a tiny processor."""
    return CharacterProcessor
