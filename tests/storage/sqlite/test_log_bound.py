"""The write-ahead log stays within its bound, whichever readers there are."""

import time
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path

import apsw
import msgspec
import pytest
import trio

from service.ids import new_session_id
from service.storage import search as any_search
from service.storage.records import SessionPatch, SessionRecord
from service.storage.sql_thread import SqlThread, Step
from service.storage.sqlite import database, open_sqlite_store, reader, sessions, writer
from service.storage.sqlite.open_files import OpenFiles
from service.storage.sqlite.reader import Reader
from tests.storage.rows import T0, a_session

SLOW = (
    "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 20000) "
    "SELECT sum(n) + count(*) FROM n, owners"
)


SEARCHED = 4000
"""Sessions through which a search walks longer than the writes of the test take."""


def _count(db: apsw.Connection) -> int:
    count: int = db.execute("SELECT count(*) FROM owners").get
    return count


def _write(db: apsw.Connection) -> int:
    db.execute("INSERT INTO owners (opened_at) VALUES (0)")
    return _count(db)


async def test_the_log_stays_bounded_while_readers_never_pause(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 500
    monkeypatch.setattr(writer, "_CHECKPOINT_PAGES", 100)
    monkeypatch.setattr(writer, "_HOUSEKEEPING_INTERVAL_S", 0.01)
    monkeypatch.setattr(writer, "_RESET_EVERY_S", 0)
    monkeypatch.setattr(writer, "_LOG_PAGES_MAX", bound)
    monkeypatch.setattr(database, "_RESET_WAIT_S", 10)  # a reader that lacks the processor does not let go earlier
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)

        async def read(thread: SqlThread[apsw.Connection]) -> None:
            while True:
                await thread.call(lambda db: db.execute(SLOW).get)

        async def write(n: int) -> None:
            for _ in range(200):
                await store.create_session(a_session(new_session_id()), now=T0)
                await store.update_session("s", SessionPatch(title=f"{n}" + "x" * 100_000), now=T0)

        with trio.fail_after(300):
            async with trio.open_nursery() as reading:
                for thread in (store._looking, store._reading, store._searching):
                    for _ in range(10):
                        reading.start_soon(read, thread)
                async with trio.open_nursery() as writing:
                    for n in range(4):
                        writing.start_soon(write, n)
                reading.cancel_scope.cancel()
        pages = path.with_name(f"{path.name}-wal").stat().st_size / 4096
        assert pages < 4 * bound


async def test_the_log_stays_bounded_during_long_searches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound, looked_at = 500, 0
    monkeypatch.setattr(writer, "_CHECKPOINT_PAGES", 100)
    monkeypatch.setattr(writer, "_HOUSEKEEPING_INTERVAL_S", 0.01)
    monkeypatch.setattr(writer, "_RESET_EVERY_S", 0)
    monkeypatch.setattr(writer, "_LOG_PAGES_MAX", bound)
    monkeypatch.setattr(database, "_RESET_WAIT_S", 10)  # a reader that lacks the processor does not let go earlier
    monkeypatch.setattr(any_search, "SEARCH_S", 60)
    visible_by_key = sessions.visible_by_key

    def look_slowly(db: apsw.Connection, key: int, now: datetime) -> SessionRecord | None:
        nonlocal looked_at
        looked_at += 1
        time.sleep(0.002)
        return visible_by_key(db, key, now)

    def fill(db: apsw.Connection) -> None:
        for n in range(SEARCHED):
            sessions.insert(db, msgspec.structs.replace(a_session(f"s{n}"), title="word"))

    monkeypatch.setattr(sessions, "visible_by_key", look_slowly)
    async with open_sqlite_store(path) as store:
        await store._writing.call(fill)
        with trio.fail_after(300):
            async with trio.open_nursery() as looking:
                for _ in range(4):
                    looking.start_soon(
                        partial(store.search_sessions, "word", limit=9, after=None, status="running", now=T0)
                    )
                for n in range(200):
                    await store.update_session("s0", SessionPatch(title=f"{n}" + "x" * 100_000), now=T0)
                assert 0 < looked_at < 4 * SEARCHED, "the searches went on all the time"
                looking.cancel_scope.cancel()
        assert path.with_name(f"{path.name}-wal").stat().st_size / 4096 < 4 * bound


def test_a_reader_that_does_not_let_go_is_waited_for_a_moment_only(path: Path) -> None:
    trio.run(_make, path)
    pages: list[int] = []
    with closing(database.connect(path)) as db, closing(database.connect(path)) as other:

        def note(_db: apsw.Connection, _name: str, size: int) -> int:
            pages.append(size)
            return apsw.SQLITE_OK

        db.set_wal_hook(note)
        _write(db)
        other.execute("BEGIN")
        before = _count(other)
        _write(db)
        assert not database.reset_log(db)
        _write(db)  # this write waits for no reader
        assert _count(other) == before
        other.execute("ROLLBACK")
        assert database.reset_log(db)
        other.execute("BEGIN")
        _count(other)
        _write(db)
        assert pages[-1] < pages[-2]  # the log began anew beside a reader


def test_a_reader_takes_a_new_snapshot_for_steps_that_come_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio.run(_make, path)
    files = OpenFiles(path)
    reading = Reader(files, monotonic=time.monotonic)
    with closing(database.connect(path)) as db:
        files.note_opened(db)
        reading.open()
        for snapshot_s, new in ((0.0, 1), (60.0, 0)):
            monkeypatch.setattr(reader, "_SNAPSHOT_S", snapshot_s)
            counts: list[int] = []

            def count_and_write(it: apsw.Connection, counts: list[int] = counts) -> None:
                counts.append(_count(it))
                with database.transaction(db):
                    _write(db)

            async def steps() -> None:
                second: Step[apsw.Connection, None] = Step(lambda it: counts.append(_count(it)))  # noqa: B023
                batches = list(reading.run(iter([Step(count_and_write), second])))
                assert list(map(len, batches)) == ([1, 1] if new else [2])  # noqa: B023

            trio.run(steps)
            assert counts[1] == counts[0] + new
        reading.close()


async def _make(path: Path) -> None:
    async with open_sqlite_store(path):
        pass
