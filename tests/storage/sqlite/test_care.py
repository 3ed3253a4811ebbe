"""What an operator can do with the file: vacuum, backup, check, export and import."""

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import trio

from service.errors import SessionExistsError, SessionNotFoundError, StartupError
from service.models.client import Usage
from service.storage.records import SessionPatch
from service.storage.sqlite import SqliteStore, care, open_sqlite_store
from tests.storage.rows import T0, a_session, a_turn, contents, ended


async def _fill(store: SqliteStore) -> None:
    await store.create_session(a_session(), now=T0)
    await store.update_session("s", SessionPatch(title="é", system_message="be brief", metadata={"a": "b"}), now=T0)
    parent = None
    for name in ("t1", "t2", "t3"):
        turn = a_turn(name, parent=parent)
        await store.begin_turn(turn, now=T0)
        usage = Usage(input_tokens=1, output_tokens=2)
        await store.end_turn(ended(turn, text="é", usage=usage), events=["é".encode(), b"2"], now=T0)
        parent = name


async def test_an_exported_session_is_the_same_when_it_is_imported_elsewhere(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        before = await contents(store, now=T0)
        exported = await trio.to_thread.run_sync(care.export_session, path, "s")
    there = path.with_name("there.db")
    async with open_sqlite_store(there) as store:
        assert await trio.to_thread.run_sync(care.import_session, there, exported) == "s"
        assert await contents(store, now=T0) == before
        # It goes on there.
        session = await store.begin_turn(a_turn("t4", parent="t3"), now=T0)
        assert (session.head, session.message_count) == ("t4", 7)
        with pytest.raises(SessionExistsError):
            care.import_session(there, exported)


async def test_an_open_turn_is_not_imported(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        await store.begin_turn(a_turn("t4", parent="t3"), now=T0)
        exported = care.export_session(path, "s")
    there = path.with_name("there.db")
    async with open_sqlite_store(there) as store:
        care.import_session(there, exported)
        session = await store.get_session("s", now=T0)
        assert (session.head, session.open_turns) == ("t3", 0)


async def test_what_is_not_there_or_is_no_export_is_refused(path: Path) -> None:
    with pytest.raises(StartupError, match="not there"):
        care.export_session(path, "s")
    async with open_sqlite_store(path):
        pass
    with pytest.raises(SessionNotFoundError):
        care.export_session(path, "s")
    for exported in (b"", b"{}", b"[]"):
        with pytest.raises(StartupError, match="not an exported session"):
            care.import_session(path, exported)
    newer = msgspec.json.encode(care.ExportedSession(format=2, session=a_session(), turns=()))
    with pytest.raises(StartupError, match="format 2"):
        care.import_session(path, newer)


async def test_a_backup_is_taken_while_the_store_is_written_to_and_is_whole(path: Path) -> None:
    copy = path.with_name("copy.db")
    async with open_sqlite_store(path) as store:
        await _fill(store)
        before = await contents(store, now=T0)
        async with trio.open_nursery() as nursery:
            for n in range(50):
                nursery.start_soon(lambda n: store.create_session(a_session(f"more-{n}"), now=T0), n)
            await trio.to_thread.run_sync(care.backup, path, copy)
        with pytest.raises(StartupError, match="there already"):
            care.backup(path, copy)
    assert care.check(copy) == []
    async with open_sqlite_store(copy) as store:
        assert (await contents(store, now=T0))["s"] == before["s"]


async def test_vacuum_gives_back_what_was_removed(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
        await store.begin_turn(a_turn("large"), now=T0)
        await store.end_turn(ended(a_turn("large")), events=[b"x" * 1_000_000] * 3, now=T0)
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
    before = path.stat().st_size  # noqa: ASYNC240
    assert care.vacuum(path) > 2_500_000
    assert path.stat().st_size < before - 2_500_000  # noqa: ASYNC240
    assert care.check(path) == []
    async with open_sqlite_store(path) as store:
        assert await contents(store, now=T0) == {}


async def test_a_check_says_what_is_wrong(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await _fill(store)
    with closing(sqlite3.connect(path)) as db:
        db.execute("DELETE FROM sessions")
        db.commit()
    assert any("turns row" in problem for problem in care.check(path))
