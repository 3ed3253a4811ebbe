"""The stores that the contract suite runs against."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import pytest

from service.storage.memory import open_memory_store
from service.storage.store import Store

OpenStore = Callable[[], AbstractAsyncContextManager[Store]]


@pytest.fixture(params=["memory"])
def open_store(request: pytest.FixtureRequest) -> OpenStore:
    """Opens an empty store, another one each time."""
    match request.param:
        case "memory":
            return open_memory_store
        case kind:
            raise AssertionError(kind)


@pytest.fixture
async def store(open_store: OpenStore) -> AsyncIterator[Store]:
    """One empty store."""
    async with open_store() as opened:
        yield opened
