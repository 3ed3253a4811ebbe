"""A file of its own for each test."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.conftest import MEMORY_DISK


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a store may be made; not on a disk, because what a disk does is tested where it matters."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as directory:
        yield Path(directory, "lastcall.db")
