"""Tiny processors and JSONL files for the tests of the data package."""

import json

import pytest
from characters import CharacterProcessor

from data.json_sources import JsonlSource


@pytest.fixture
def processor():
    """Return the class of a tiny processor."""
    return CharacterProcessor


@pytest.fixture
def write_jsonl(tmp_path):
    """Write records (or raw bytes) as lines and open the file as a source."""

    def write(records, name="train"):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
        return JsonlSource(path, name, tmp_path)

    return write


@pytest.fixture
def questions(write_jsonl):
    """A source of ``n`` text samples of growing length; sample ``i`` has the answer ``str(i)``."""

    def make(n, name="train", length=lambda i: 1):
        return write_jsonl([{"question": "?" * length(i), "answer": str(i)} for i in range(n)], name)

    return make
