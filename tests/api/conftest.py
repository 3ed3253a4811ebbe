"""Services that come after each other, on one store."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service import supervisor
from service.storage.memory import MemoryStore
from tests.api import inprocess


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """The store of all services of a test, in the place of a file that outlives them."""
    store = MemoryStore()
    monkeypatch.setattr(inprocess, "STORE_URL", "sqlite:shared.db")

    @asynccontextmanager
    async def open_store(*_: object) -> AsyncIterator[MemoryStore]:
        yield store

    monkeypatch.setattr(supervisor, "_open_store", open_store)
    return store
