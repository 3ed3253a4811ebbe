"""Waits for locks, as the server tells of them."""

import trio

from tests.postgres_server import PostgresServer


async def until_something_waits(postgres: PostgresServer) -> None:
    """Wait until a statement waits for a lock."""
    while not postgres.run("SELECT 1 FROM pg_locks WHERE NOT granted"):  # noqa: ASYNC110  no event tells it
        await trio.sleep(0.01)
