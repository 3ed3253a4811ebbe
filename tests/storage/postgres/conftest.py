"""One store in PostgreSQL, and its tables."""

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import pytest

from service.storage.postgres import PostgresStore, connections, open_postgres_store, owners
from tests.postgres_server import PostgresServer
from tests.storage.conftest import OpenStore

Run = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(autouse=True)
def _transactions_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server keeps a transaction that a test holds open, and a write waits for it, also while the machine stands
    still for some seconds."""
    monkeypatch.setattr(connections, "IDLE_MAX_S", 120)
    monkeypatch.setattr(owners, "RENEW_MAX_S", 60)


@pytest.fixture
def schema(postgres: PostgresServer) -> Iterator[str]:
    with postgres.empty_schema() as schema:
        yield schema


@pytest.fixture
def open_another(postgres: PostgresServer, schema: str) -> OpenStore:
    """Opens the same store each time, for another owner."""
    return partial(open_postgres_store, postgres.url, schema_name=schema)


@pytest.fixture
async def store(open_another: OpenStore) -> AsyncIterator[PostgresStore]:
    async with open_another() as opened:
        assert isinstance(opened, PostgresStore)
        yield opened


@pytest.fixture
def select(postgres: PostgresServer, schema: str) -> Run:
    """Runs a query in which ``{s}.`` stands before the names of tables. Returns its rows."""
    return lambda query: postgres.run(query.replace("{s}.", f"{schema}."))
