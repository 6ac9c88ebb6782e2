"""The tiny processor, for the tests of caches."""

import pytest
from characters import CharacterProcessor


@pytest.fixture
def processor():
    """Makes a processor."""
    return CharacterProcessor
