"""A file of its own for each test."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.conftest import MEMORY_DISK


@pytest.fixture
def path() -> Iterator[Path]:
    """A path for a store, in memory: tests that depend on a real disk choose their own path."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as directory:
        yield Path(directory, "lastcall.db")
