"""Fills a store with many sessions, for measurements that depend on their number."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trio

from service.storage.memory import open_memory_store
from service.storage.records import SessionRecord
from service.storage.sqlite import open_sqlite_store
from service.storage.store import Store

_AT_ONCE_MAX = 200


@asynccontextmanager
async def open_store(kind: str, path: Path) -> AsyncIterator[Store]:
    """Open an empty store: ``memory``, or ``sqlite`` at a path that does not exist yet."""
    if kind == "memory":
        async with open_memory_store() as store:
            yield store
    else:
        async with open_sqlite_store(str(path), close_timeout_s=30) as store:
            yield store


async def fill(store: Store, count: int, *, expired: int = 0) -> None:
    """Add sessions, the first ``expired`` of which expired a minute ago."""
    now = datetime.now(UTC)
    limiter = trio.CapacityLimiter(_AT_ONCE_MAX)

    async def add(number: int) -> None:
        past = number < expired
        created = now - timedelta(hours=1) if past else now
        session = SessionRecord(
            id=f"s{number}",
            created_at=created,
            last_accessed_at=created,
            expires_at=now - timedelta(minutes=1) if past else now + timedelta(days=1),
            idle_timeout_s=1800,
        )
        async with limiter:
            await store.create_session(session, now=created)

    for start in range(0, count, 10_000):
        async with trio.open_nursery() as nursery:
            for number in range(start, min(start + 10_000, count)):
                nursery.start_soon(add, number)
