"""Pages of many sessions: fills each kind of store with the same sessions, and reads pages of them from the store."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apsw
import trio

from bench.database import Database
from bench.rows import spread
from bench.store_rows import StoreRow
from service.steps import at_once
from service.storage.memory import open_memory_store
from service.storage.metadata_pairs import pairs_of
from service.storage.moments import moment
from service.storage.records import Item, SessionRecord, SessionStatus, TurnRecord
from service.storage.sqlite import documents as sqlite_documents
from service.storage.sqlite import open_sqlite_store
from service.storage.sqlite import sessions as sqlite_sessions
from service.storage.store import Store
from service.storage.terms import document_terms

if TYPE_CHECKING:
    import psycopg

PAGE = 50
FOUND = 20
DEEP_PAGE = 1000
TEAMS = 1000
"""Each team has one of so many sessions, and the name of a team is their metadata."""
RUNNING = 200
"""Sessions with an open turn."""
_FILLED_AT_ONCE = 10_000
_SCHEMA = "pages"
_PLACES = [f"place{number}" for number in range(100)]
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")


def session_of(number: int, now: datetime) -> SessionRecord:
    """The session of a number: a second older than that of the number before."""
    created = now - timedelta(seconds=number)
    place, month = _PLACES[number * 7 % len(_PLACES)], _MONTHS[number * 3 % len(_MONTHS)]
    return SessionRecord(
        id=f"s{number}",
        created_at=created,
        last_accessed_at=created,
        expires_at=now + timedelta(days=30),
        idle_timeout_s=30 * 86400.0,
        title=f"Plan n{number} a week in {place} in {month}",
        metadata={"team": f"team-{number % TEAMS}"},
    )


async def measure(
    kind: str, sessions: int, folder: Path, database: Database | None, *, times: int, repeat: int
) -> list[StoreRow]:
    """Fill a store of this kind, and read pages of it.

    Args:
        database: A running server, for the kind ``postgresql``.
        times: How often each page is read.
    """
    now = datetime.now(UTC)
    async with _open_filled(kind, sessions, now, folder, database) as store:
        for number in range(min(RUNNING, sessions)):
            await store.begin_turn(_turn_of(number * (sessions // RUNNING or 1), now), now=now)
        rows = []
        for what, read in (await _calls(store, sessions, now)).items():
            took_ms, lost = [], 0
            for _ in range(times):
                began = time.perf_counter()
                lost += not await read()
                took_ms.append((time.perf_counter() - began) * 1000)
            rows.append(StoreRow(what=what, store=kind, repeat=repeat, n=times, lost=lost, took_ms=spread(took_ms)))
        return rows


async def _calls(store: Store, sessions: int, now: datetime) -> dict[str, Callable[[], Awaitable[bool]]]:
    """What is measured, by its name. A call says whether its page has what it should have."""
    deep = min(DEEP_PAGE, sessions // PAGE - 1)
    cursor = None
    for _ in range(deep):
        cursor = (await store.list_sessions(limit=PAGE, after=cursor, status=None, now=now)).next

    async def listed(
        wanted: int,
        *,
        after: str | None = None,
        status: SessionStatus | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        page = await store.list_sessions(limit=PAGE, after=after, status=status, now=now, metadata=metadata)
        return len(page.data) == wanted and not page.partial

    async def found(query: str, wanted: int) -> bool:
        page = await store.search_sessions(query, limit=FOUND, after=None, status=None, now=now)
        return len(page.data) == wanted and not page.partial

    count = f"{sessions:,} sessions"
    both = len({number for number in range(sessions) if number * 7 % 100 == 7 and number * 3 % 10 == 3})
    return {
        f"list, first page, {count}": partial(listed, PAGE),
        f"list, after {deep} pages, {count}": partial(listed, PAGE, after=cursor),
        f"list, running, {count}": partial(listed, min(PAGE, RUNNING), status="running"),
        f"list, idle, {count}": partial(listed, PAGE, status="idle"),
        f"list, by metadata, {count}": partial(listed, min(PAGE, sessions // TEAMS), metadata={"team": "team-7"}),
        f"search, a rare word, {count}": partial(found, f"n{sessions // 2}", 1),
        f"search, two common words, {count}": partial(found, f"{_PLACES[7]} {_MONTHS[3]}", min(FOUND, both)),
        f"search, a word of all, {count}": partial(found, "plan", FOUND),
    }


def _turn_of(number: int, now: datetime) -> TurnRecord:
    return TurnRecord(
        id=f"turn-{number}",
        session_id=f"s{number}",
        parent=None,
        state="queued",
        model="bench",
        created_at=now,
        input=(Item(id=f"item-{number}", role="user", text="Well?"),),
    )


@asynccontextmanager
async def _open_filled(
    kind: str, sessions: int, now: datetime, folder: Path, database: Database | None
) -> AsyncIterator[Store]:
    if kind == "memory":
        async with open_memory_store() as store:
            for number in reversed(range(sessions)):  # the oldest one first, as they would have come
                await store.create_session(session_of(number, now), now=now)
            yield store
    elif kind == "sqlite":
        path = str(folder / f"pages-{sessions}.db")
        async with open_sqlite_store(path, close_timeout_s=60):
            pass
        await trio.to_thread.run_sync(_fill_sqlite, path, sessions, now)
        async with open_sqlite_store(path, close_timeout_s=60) as store:
            yield store
    else:
        from service.storage.postgres import open_postgres_store  # noqa: PLC0415  an extra of the service

        assert database is not None
        async with open_postgres_store(database.url, schema_name=_SCHEMA):
            pass
        await trio.to_thread.run_sync(_fill_postgres, database, sessions, now)
        async with open_postgres_store(database.url, schema_name=_SCHEMA) as store:
            yield store
        database.run(f"DROP SCHEMA {_SCHEMA} CASCADE")


def _fill_sqlite(path: str, sessions: int, now: datetime) -> None:
    with closing(apsw.Connection(path)) as db:
        db.execute("PRAGMA synchronous = OFF")
        for end in range(sessions, 0, -_FILLED_AT_ONCE):
            with db:
                for number in reversed(range(max(end - _FILLED_AT_ONCE, 0), end)):
                    sqlite_sessions.insert(db, session_of(number, now))
        with db:
            while sqlite_documents.merge_some(db):
                pass


def _fill_postgres(database: Database, sessions: int, now: datetime) -> None:
    """Copy the rows of all sessions into the tables, as the store would write them."""
    from service.storage.postgres import documents  # noqa: PLC0415  an extra of the service
    from service.storage.postgres.rows import idle_us_of, settings_of  # noqa: PLC0415

    keyed = [(sessions - number, session_of(number, now)) for number in reversed(range(sessions))]
    with database.connect() as db:
        index = f"SELECT indexdef FROM pg_indexes WHERE schemaname = '{_SCHEMA}' AND indexname = 'documents_by_term'"
        [(make_index,)] = db.execute(index.encode()).fetchall()
        db.execute(f"DROP INDEX {_SCHEMA}.documents_by_term".encode())
        _copy(
            db,
            "sessions (key, id, owner_name, created_at, last_accessed_at, expires_at, idle_us, ephemeral, "
            "turns, message_count, input_tokens, output_tokens, reasoning_tokens, cached_tokens, text_bytes, settings)",
            (
                (
                    *(key, it.id, it.owner, moment(it.created_at), moment(it.last_accessed_at), moment(it.expires_at)),
                    *(idle_us_of(it), it.ephemeral, 0, 0, 0, 0, 0, 0, it.text_bytes, settings_of(it)),
                )
                for key, it in keyed
            ),
        )
        _copy(
            db,
            "session_metadata (pair, created_at, id, session)",
            (
                (digest, moment(it.created_at), it.id, key)
                for key, it in keyed
                for pair in pairs_of(it)
                for digest in pair
            ),
        )
        levels = range(len(documents.LEVELS))
        _copy(
            db,
            "documents (key, session, turn, terms)",
            (
                (
                    *(key, key, None),
                    [
                        *(documents.block_mark(key, level) for level in levels),
                        *(documents.owner_mark(it.owner), documents.session_mark(key)),
                        *at_once(document_terms((it.title or "",))),
                    ],
                )
                for key, it in keyed
            ),
        )
        db.execute(make_index.encode())
        for table in ("sessions", "documents"):
            db.execute(f"SELECT setval('{_SCHEMA}.{table}_key_seq', {sessions})".encode())
        for table in ("sessions", "session_metadata", "documents"):
            db.execute(f"VACUUM ANALYZE {_SCHEMA}.{table}".encode())


def _copy(db: "psycopg.Connection[Any]", table: str, rows: Iterable[Sequence[object]]) -> None:
    with db.cursor() as cursor, cursor.copy(f"COPY {_SCHEMA}.{table} FROM STDIN".encode()) as copy:
        for row in rows:
            copy.write_row(row)
