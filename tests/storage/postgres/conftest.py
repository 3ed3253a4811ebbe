"""One store in PostgreSQL, and its tables."""

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import pytest

from service.storage.postgres import PostgresStore, open_postgres_store
from tests.postgres_server import PostgresServer
from tests.storage.conftest import OpenStore

Run = Callable[..., list[tuple[Any, ...]]]


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
