"""A file of schema 3 gets its indexes while it is in use; until they are whole, pages are partial."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from service.storage.moments import moment
from service.storage.records import SessionPatch, SessionRecord
from service.storage.sqlite import SqliteStore, database, indexing, maintenance, open_sqlite_store
from service.storage.sqlite.writer import Writer
from tests.storage.rows import T0, a_turn, at, ended, said
from tests.storage.sqlite.old_files import old_file
from tests.storage.test_store_search import found

VERSION = 3
LONG = "long " * 40_000
SESSIONS = 4
TURNS = 5


def write(path: Path, *, sessions: int = SESSIONS, turns: int = TURNS, long: bool = True) -> None:
    """A file of schema 3: sessions with titles and pairs; the last turn of each is open, and its process is gone."""
    with old_file(path, VERSION) as db:
        now = moment(T0)
        for key in range(1, sessions + 1):
            db.execute(
                "INSERT INTO sessions (key, id, created_at, last_accessed_at, expires_at, idle_timeout_s, head, "
                "message_count, open_turns, owner, turns_begun) VALUES (?, ?, ?, ?, ?, 1e9, ?, 0, 1, 1, ?)",
                (key, f"s{key}", now + key, now, now + 10**15, f"t{key}-{turns - 1}", turns),
            )
            metadata = json.dumps({"n": str(key % 2)})
            db.execute(
                "INSERT INTO session_settings (session, title, metadata) VALUES (?, ?, ?)",
                (key, f"title {key}", metadata),
            )
            db.executemany(
                "INSERT INTO turns (session, ordinal, id, parent, owner, state, model, created_at, background, "
                "last_seq, message_bytes, message_items, input, output, runs) "
                "VALUES (?, ?, ?, ?, ?, ?, 'm', ?, 0, 2, 1, 1, ?, ?, ?)",
                (_turn(key, n, turns, now, long=long) for n in range(turns)),
            )
        db.commit()


def _turn(session: int, n: int, turns: int, now: int, *, long: bool) -> tuple[object, ...]:
    is_open = n == turns - 1
    text = f"question {session}q{n}"
    reply = f"{LONG}{session}x{n}" if long and n == 1 else f"reply {session}x{n}"
    return (
        *(session, n, f"t{session}-{n}", f"t{session}-{n - 1}" if n else None),
        *(1 if is_open else None, "running" if is_open else "completed", now),
        json.dumps([{"id": f"i{n}", "type": "message", "role": "user", "text": text}]),
        json.dumps([] if is_open else [{"id": f"o{n}", "type": "message", "role": "assistant", "text": reply}]),
        None if is_open else b"\x90",
    )


async def index_whole(store: SqliteStore) -> None:
    with trio.fail_after(60):
        while store.writer._indexing is not None:  # noqa: ASYNC110  no event tells the end
            await trio.sleep(0.001)


async def test_all_old_rows_are_found_once_the_indexes_are_whole(path: Path) -> None:
    write(path)
    with capture_logs() as logs:
        async with open_sqlite_store(path) as store:
            await index_whole(store)
    told = [line["event"].partition(" ")[0] for line in logs if "search index" in line["event"]]
    assert told == ["earlier", "the"], "the begin and the end, once"
    async with open_sqlite_store(path) as store:
        await store.recover(now=T0)
        assert await found(store, "title") == ["s4", "s3", "s2", "s1"]
        assert await found(store, "question", limit=1) == ["s4", "s3", "s2", "s1"]
        for session in range(1, SESSIONS + 1):
            for n in range(TURNS):
                assert await found(store, f"question {session}q{n}") == [f"s{session}"], "also the turns of a crash"
            assert await found(store, f"{session}x1 long") == [f"s{session}"]
        page = await store.list_sessions(limit=9, after=None, status=None, now=T0, metadata={"n": "1"})
        assert ([it.id for it in page.data], page.partial) == (["s3", "s1"], False)
    assert maintenance.check(path) == []


async def test_pages_are_partial_until_the_indexes_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path)
    with monkeypatch.context() as paused:
        paused.setattr(Writer, "run_housekeeping", lambda _, *, idle: None)  # noqa: ARG005
        async with open_sqlite_store(path) as store:
            for listing in (
                store.search_sessions("title", limit=9, after=None, status=None, now=T0),
                store.list_sessions(limit=9, after=None, status=None, now=T0, metadata={"n": "1"}),
            ):
                page = await listing
                assert (page.data, page.next, page.partial) == ((), None, True)
            plain = await store.list_sessions(limit=9, after=None, status=None, now=T0)
            assert (len(plain.data), plain.partial) == (4, False)
            # What is written meanwhile is found at once, and is not indexed twice later.
            await store.recover(now=T0)
            await store.update_session("s1", SessionPatch(title="renamed", metadata={"n": "9"}), now=T0)
            await store.update_session("s2", SessionPatch(title=None), now=T0)
            await store.begin_turn(a_turn("new", "s1"), now=T0)
            await store.end_turn(ended(a_turn("new", "s1"), text="fresh"), runs=said("fresh"), now=T0)
            page = await store.search_sessions("fresh", limit=9, after=None, status=None, now=T0)
            assert ([it.session.id for it in page.data], page.partial) == (["s1"], True)
            await store.mark_deleted("s3", now=T0)
            await store.remove_deleted("s3")
    async with open_sqlite_store(path) as store:
        await index_whole(store)
        assert await found(store, "title") == ["s4"]
        assert await found(store, "renamed") == await found(store, "fresh") == ["s1"]
        assert await found(store, "question") == ["s4", "s2", "s1"]
        page = await store.list_sessions(limit=9, after=None, status=None, now=T0, metadata={"n": "9"})
        assert [it.id for it in page.data] == ["s1"]
    assert maintenance.check(path) == []


async def test_steps_are_short_and_go_on_where_another_process_ended(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "STEP_S", 0)
    write(path)
    async with open_sqlite_store(path):
        pass
    steps = 0
    while True:
        with closing(database.connect(path)) as db:  # each process does one step, and is killed
            if (work := indexing.Indexing()).is_done(db):
                break
            before = db.execute("SELECT count(*) FROM documents").get

            def transact(step: object) -> object:
                with database.transaction(db):
                    return step(db)  # type: ignore[operator]

            work.run_step(transact)
            while work._long is not None:
                work.run_step(transact)
            assert db.execute("SELECT count(*) FROM documents").get <= before + 1
        steps += 1
        assert steps < 200
    async with open_sqlite_store(path) as store:
        await store.recover(now=T0)
        assert await found(store, "question") == await found(store, "title") == ["s4", "s3", "s2", "s1"]
    assert maintenance.check(path) == []


async def test_a_step_adds_one_part_to_the_index_however_many_rows_it_takes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "STEP_S", 60)
    write(path, sessions=10, turns=20, long=False)
    with monkeypatch.context() as paused:
        paused.setattr(Writer, "run_housekeeping", lambda _, *, idle: None)  # noqa: ARG005
        async with open_sqlite_store(path):
            pass
    with closing(database.connect(path)) as db:
        work, steps = indexing.Indexing(), 0

        def transact(step: object) -> object:
            with database.transaction(db):
                return step(db)  # type: ignore[operator]

        while not work.is_done(db):
            work.run_step(transact)
            steps += 1
        documents = db.execute("SELECT count(*) FROM documents").get
        assert documents == 10 + 10 * 19
        assert db.execute("SELECT count(DISTINCT segid) FROM search_idx").get <= steps < 5


async def test_one_of_several_processes_indexes_and_another_goes_on_when_it_is_gone(path: Path) -> None:
    write(path)
    async with open_sqlite_store(path) as other:
        async with open_sqlite_store(path) as store:
            assert store.fence > other.fence
        await index_whole(other)
        assert await found(other, "title", now=1) == ["s4", "s3", "s2", "s1"]


async def test_a_damaged_row_is_left_out(path: Path) -> None:
    write(path, long=False)
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE turns SET input = '[{\"broken' WHERE id = 't1-0'")
        db.execute("UPDATE session_settings SET metadata = '[]' WHERE session = 2")
        db.commit()
    async with open_sqlite_store(path) as store:
        await index_whole(store)
        for name in ("s3", "s4"):
            assert await found(store, f"question {name[1]}q0") == [name]
        assert await found(store, "question 1q0") == []
        assert (await store.get_session("s1", now=T0)).title == "title 1"


async def test_a_fork_and_a_new_session_are_found_beside_old_rows(path: Path) -> None:
    write(path, long=False)
    async with open_sqlite_store(path) as store:
        await store.recover(now=T0)
        await store.fork_session("s1", at="t1-3", copy_id="copy", now=at(1))
        session = SessionRecord(
            id="new", created_at=T0, last_accessed_at=T0, expires_at=at(99), idle_timeout_s=99, title="title"
        )
        await store.create_session(session, now=T0)
        await index_whole(store)
        assert await found(store, "title") == ["new", "copy", "s4", "s3", "s2", "s1"]
        assert await found(store, "question 1q3") == ["copy", "s1"]


async def test_a_check_finds_what_the_index_has_lost(path: Path) -> None:
    write(path, sessions=1, long=False)
    async with open_sqlite_store(path) as store:
        await store.recover(now=T0)
        await index_whole(store)
        assert maintenance.check(path) == []
    with closing(database.connect(path)) as db:
        numbers = [key for (key,) in db.execute("SELECT key FROM documents ORDER BY key")]
        db.execute("DELETE FROM documents WHERE key = ?", (numbers[0],))
        db.execute("DELETE FROM search WHERE rowid = ?", (numbers[-1],))
        db.execute("DELETE FROM documents WHERE turn IS NULL")
    found = maintenance.check(path)
    assert found == [
        "session 's1': turn 't1-0' is not searched",
        "session 's1': the title is not searched",
        f"document {numbers[-1]} has no terms in the search index",
    ]
