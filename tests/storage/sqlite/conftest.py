"""A file of its own for each test."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.storage.sqlite import writer
from tests.storage.conftest import MEMORY_DISK


@pytest.fixture
def path() -> Iterator[Path]:
    """A path for a store, in memory: tests that depend on a real disk choose their own path."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as directory:
        yield Path(directory, "lastcall.db")


@pytest.fixture
def one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that wait together share one commit, however long they take."""
    monkeypatch.setattr(writer, "_COMMIT_AFTER_S", 60)
