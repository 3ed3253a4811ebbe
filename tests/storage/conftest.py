"""The stores that the contract suite runs against."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from math import inf
from pathlib import Path

import pytest

from service.storage import search, sql_thread
from service.storage.memory import open_memory_store
from service.storage.memory import store as memory_store
from service.storage.postgres import metadata as postgres_metadata
from service.storage.sqlite import metadata as sqlite_metadata
from service.storage.sqlite import open_sqlite_store
from service.storage.sqlite import store as sqlite_store
from service.storage.sqlite import turns as sqlite_turns
from service.storage.store import Store
from tests.postgres_server import PostgresServer, running

MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""The folder for the files of tests of behaviour. Promises about the disk are tested on a disk."""

OpenStore = Callable[[], AbstractAsyncContextManager[Store]]

IN_PROCESS = pytest.mark.parametrize("open_store", ["memory", "sqlite"], indirect=True)
ON_A_SERVER = pytest.mark.parametrize("open_store", ["postgres"], indirect=True)
"""For a property test whose examples make thousands of calls: with a server each call takes several times as long, so
such a test has fewer examples there."""


@pytest.fixture(autouse=True)
def _searches_and_paths_have_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page is partial and no path is left out because the machine stood still, or the garbage was collected. A test
    of these bounds sets them itself."""
    for module in (search, memory_store, sqlite_metadata, postgres_metadata):
        monkeypatch.setattr(module, "SEARCH_S", inf)
    monkeypatch.setattr(sqlite_turns, "SHORT_PATH_S", inf)


@pytest.fixture
def callers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled caller waits for its step that has begun, also while the machine stands still: then the step is done
    or undone when the call has ended, and not while the test looks."""
    for module in (sql_thread, sqlite_store):
        monkeypatch.setattr(module, "CLAIMED_GRACE_S", 60)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def open_store(request: pytest.FixtureRequest) -> OpenStore:
    """Opens a new, empty store each time."""
    match request.param:
        case "memory":
            return open_memory_store
        case "sqlite":
            return open_new_sqlite_store
        case "postgres":
            return partial(open_new_postgres_store, running(request.config))
        case kind:
            raise AssertionError(kind)


@asynccontextmanager
async def open_new_sqlite_store() -> AsyncIterator[Store]:
    """A store in a file of its own, which is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as directory:
        async with open_sqlite_store(f"{directory}/lastcall.db") as store:
            yield store


@asynccontextmanager
async def open_new_postgres_store(server: PostgresServer) -> AsyncIterator[Store]:
    """A store in a schema of its own, which is emptied afterwards."""
    from service.storage.postgres import open_postgres_store

    with server.empty_schema() as schema:
        async with open_postgres_store(server.url, schema_name=schema) as store:
            yield store


@pytest.fixture
async def store(open_store: OpenStore) -> AsyncIterator[Store]:
    """One empty store."""
    async with open_store() as opened:
        yield opened


@pytest.fixture(params=["sqlite", "postgres"])
def open_shared(request: pytest.FixtureRequest) -> Iterator[OpenStore]:
    """Opens the same store each time, for another owner; only stores that outlive their owners."""
    match request.param:
        case "sqlite":
            with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as directory:
                yield partial(open_sqlite_store, f"{directory}/lastcall.db")
        case "postgres":
            from service.storage.postgres import open_postgres_store

            server = running(request.config)
            with server.empty_schema() as schema:
                yield partial(open_postgres_store, server.url, schema_name=schema)
        case kind:
            raise AssertionError(kind)
