"""What the tests of caches share: a tiny processor."""

import pytest
from characters import CharacterProcessor


@pytest.fixture
def processor():
    """Return the class of a tiny processor."""
    return CharacterProcessor
