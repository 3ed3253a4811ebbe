"""The promises of the store in a file beyond the contract."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio

from service.errors import StoreError
from service.storage.sql_thread import Step
from service.storage.sqlite import SqliteStore, database, maintenance, open_sqlite_store, reclaim, sessions, writer
from service.store_capabilities import SQLITE
from tests.storage.rows import T0, a_session, a_turn, all_sessions, at, ended, said
from tests.storage.sqlite import file_exports
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_owners import a_checkpoint


async def test_it_says_where_it_is_and_only_its_owner_can_read_it(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        assert (store.name, store.capabilities) == (f"sqlite:{path}", SQLITE)
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


async def test_a_relative_path_is_shown_in_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    async with open_sqlite_store("here.db") as store:
        assert store.name == f"sqlite:{path.parent}/here.db"


async def test_a_process_that_opens_the_file_by_a_link_shares_its_owners(path: Path) -> None:
    link = path.with_name("link.db")
    link.symlink_to(path)
    async with open_sqlite_store(path) as store, open_sqlite_store(link) as other:
        assert other.name == store.name
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        assert await other.recover(now=T0) == 0
        assert (await other.get_turn("s", "t", now=T0)).is_open
        assert [it.name for it in path.parent.glob("*-owners")] == [f"{path.name}-owners"]  # noqa: ASYNC240


async def test_a_new_connection_writes_nothing_to_a_file_that_is_there(path: Path) -> None:
    async with open_sqlite_store(path):
        log = path.with_name(f"{path.name}-wal")
        before = log.read_bytes()
        database.connect(path).close()
        assert log.read_bytes() == before


# The thread


@asynccontextmanager
async def writer_held_up(store: SqliteStore) -> AsyncIterator[None]:
    """What is called within the context waits for the writer, which is in the middle of a step."""
    working, go_on = threading.Event(), threading.Event()

    def work(_: object) -> None:
        working.set()
        go_on.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store._writing.call, work)
        try:
            await trio.to_thread.run_sync(working.wait)
            yield
        finally:
            go_on.set()


@pytest.mark.usefixtures("one_commit")
async def test_steps_that_wait_together_share_a_commit_and_a_lone_one_does_not_wait(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        before = store.writer.commits
        await store.create_session(a_session(), now=T0)
        assert store.writer.commits == before + 1
        async with trio.open_nursery() as nursery, writer_held_up(store):
            for n in range(200):
                nursery.start_soon(lambda n: store.begin_turn(a_turn(f"t{n}"), now=T0), n)
            await trio.testing.wait_all_tasks_blocked()
        assert store.writer.commits == before + 2
        assert (await store.get_session("s", now=T0)).open_turns == 200


async def test_a_caller_that_leaves_before_its_step_began_leaves_nothing(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        async with writer_held_up(store):
            with trio.fail_after(60):
                with trio.move_on_after(0.01) as waiting:
                    await store.create_session(a_session(), now=T0)
                assert waiting.cancelled_caught
        assert await all_sessions(store, now=T0) == []


@pytest.mark.usefixtures("callers_wait")
async def test_a_caller_that_leaves_in_the_middle_of_its_step_leaves_all_of_it(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        working, go_on = threading.Event(), threading.Event()

        async def create() -> None:
            def step(db: apsw.Connection) -> None:
                working.set()
                go_on.wait()
                sessions.create(db, a_session(), T0)

            await store._writing.call(step)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(create)
                await trio.to_thread.run_sync(working.wait)
                nursery.cancel_scope.cancel()
                go_on.set()
        assert len(await all_sessions(store, now=T0)) == 1


async def test_a_bug_in_a_step_is_its_caller_s_alone(path: Path) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    async with open_sqlite_store(path) as store:
        for thread in (store._writing, store._looking):
            with pytest.raises(ZeroDivisionError):
                await thread.call(fail)
        await store.create_session(a_session(), now=T0)
        assert (await store.get_session("s", now=T0)).id == "s"


async def test_a_closed_store_refuses_and_can_be_closed_again(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.aclose()
        with pytest.raises(StoreError, match="closed"):
            await store.get_session("s", now=T0)


async def test_steps_that_were_submitted_before_the_close_are_done(path: Path) -> None:
    async with open_sqlite_store(path) as store, trio.open_nursery() as nursery:
        for n in range(50):
            nursery.start_soon(lambda n: store.create_session(a_session(f"s{n}"), now=T0), n)
        await trio.testing.wait_all_tasks_blocked()
        await store.aclose()
    async with open_sqlite_store(path) as store:
        assert len(await all_sessions(store, now=T0)) == 50


async def test_a_read_of_several_statements_sees_one_moment(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        begun, go_on = threading.Event(), threading.Event()
        counts: list[int] = []

        def count_twice(db: apsw.Connection) -> None:
            counts.append(sessions.count(db, None, T0))
            begun.set()
            go_on.wait()
            counts.append(sessions.count(db, None, T0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._reading.call, count_twice)
            await trio.to_thread.run_sync(begun.wait)
            await store.create_session(a_session(), now=T0)
            go_on.set()
        assert counts == [0, 0]
        assert await store.count_sessions(status=None, now=T0) == 1


# Owners that are processes

BEGIN = """
import os, sys, trio
from service.storage.sqlite import open_sqlite_store
from tests.storage.rows import T0, a_session, a_turn

async def main():
    async with open_sqlite_store(sys.argv[1]) as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        if sys.argv[2] == "fork" and os.fork() == 0:
            os.write(1, b"child %d\\n" % os.getpid())
            sys.stdin.read()
            os._exit(0)
        os.write(1, b"begun\\n")
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.processes
@pytest.mark.parametrize("how", ["kill", "fork"])
def test_the_turns_of_a_process_that_is_killed_are_recovered_even_if_a_child_of_it_lives(path: Path, how: str) -> None:
    async def recovered() -> int:
        async with open_sqlite_store(path) as store:
            return await store.recover(now=at(1))

    with subprocess.Popen(
        [sys.executable, "-c", BEGIN, str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        told = {process.stdout.readline() for _ in range(1 + (how == "fork"))}
        assert b"begun\n" in told
        assert trio.run(recovered) == 0, "it lives"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert trio.run(recovered) == 1
        process.stdin.close()  # the child ends
        process.stdout.read()
        for child in (int(line.split()[1]) for line in told if line.startswith(b"child")):
            with suppress(ChildProcessError):  # the child is ours only if this process adopts orphans
                os.waitpid(child, 0)


async def test_a_step_of_the_recovery_ends_few_turns_where_they_are_large(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        for n in range(50):
            await store.begin_turn(a_turn(f"t{n}"), now=T0)
            await store.checkpoint_turns([a_checkpoint(f"t{n}", "é" * 100_000)])
    async with open_sqlite_store(path) as store:
        steps: list[None] = []
        assert await store.recover(now=T0, after_step=lambda: steps.append(None)) == 50
        assert len(steps) >= 50 / 6, "each of them ends six of 200 KB"
        session = await store.get_session("s", now=T0)
        assert (session.open_turns, session.message_count) == (0, 100)


# Removal


async def _with_events(store: SqliteStore, *, rows: int) -> None:
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    await store.end_turn(ended(a_turn(), text="x" * 60_000 * rows), runs=said(*["x" * 60_000] * rows), now=T0)
    await store.begin_turn(a_turn("t2"), now=T0)
    await store.checkpoint_turns([a_checkpoint("t2", "x")])


async def _until_empty(store: SqliteStore) -> None:
    def rows(db: apsw.Connection) -> int:
        tables = ("sessions", "session_settings", "turns", "events", "event_pages", "outputs")
        return sum(db.execute(f"SELECT count(*) FROM {table}").get for table in tables)

    with trio.fail_after(60):
        while await store._looking.call(rows):  # noqa: ASYNC110  no event tells the end
            await trio.sleep(0.005)


async def test_removed_rows_are_reclaimed_step_by_step_and_the_file_shrinks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaim, "STEP_S", 0.0005)
    monkeypatch.setattr(reclaim, "_FREE_PAGES_KEPT", 0)
    monkeypatch.setattr(writer, "_CHECKPOINT_PAGES", 1)
    async with open_sqlite_store(path) as store:
        await _with_events(store, rows=20)
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
        await store.create_session(a_session(), now=T0)  # the id is free at once
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
        await _until_empty(store)
        with trio.fail_after(60):
            while (await trio.Path(path).stat()).st_size > 1_000_000:  # noqa: ASYNC110
                await trio.sleep(0.005)


async def test_the_next_process_reclaims_the_rows_that_one_left(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        store.writer.removed = False
        await _with_events(store, rows=2)
        await store.mark_deleted("s", now=T0)
        await store._writing.call(lambda db: db.execute("UPDATE sessions SET id = NULL, deletion = 2"))
    async with open_sqlite_store(path) as store:
        await _until_empty(store)


async def test_the_writer_rests_on_a_file_that_cannot_shrink(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "_FREE_PAGES_KEPT", 0)
    async with open_sqlite_store(path):
        pass
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA auto_vacuum = NONE")
        db.execute("VACUUM")
    async with open_sqlite_store(path) as store:
        await _with_events(store, rows=5)
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
        with trio.fail_after(60):
            while store.writer.removed:  # noqa: ASYNC110  no event tells the end
                await trio.sleep(0.005)
        await _until_empty(store)


@pytest.mark.parametrize("found", [b"", b"half", bytes(32)], ids=["an earlier version's", "torn", "zeros"])
async def test_a_store_without_a_secret_gets_one_that_no_backup_has(path: Path, found: bytes) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
    owners = path.with_name(f"{path.name}-owners")
    owners.write_bytes(found)  # noqa: ASYNC240
    async with open_sqlite_store(path) as store:
        secret = store.peer_secret
        assert any(secret)
        assert owners.read_bytes() == secret  # noqa: ASYNC240
        assert owners.stat().st_mode & 0o777 == 0o600  # noqa: ASYNC240
        copy = path.with_name("copy.db")
        maintenance.backup(path, copy)
        assert secret not in copy.read_bytes()  # noqa: ASYNC240
        assert secret not in file_exports.export_session(path, "s")


class SharedFile:
    """A connection to a new file whose journal mode another connection changes at the same time, for some calls."""

    def __init__(self, *, busy_calls: int) -> None:
        self.busy_calls = busy_calls

    def pragma(self, name: str, value: str) -> str:
        assert name == "journal_mode"
        if self.busy_calls:
            self.busy_calls -= 1
            raise apsw.BusyError
        return value.lower()


def test_processes_that_open_a_new_file_at_once_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite does not call the busy handler in this case, so six threads that open a new file at once may fail."""
    assert database._enter_wal(SharedFile(busy_calls=3)) == "wal"  # type: ignore[arg-type]
    monkeypatch.setattr(database, "_LOCK_WAIT_S", 0.002)
    with pytest.raises(apsw.BusyError):
        database._enter_wal(SharedFile(busy_calls=10))  # type: ignore[arg-type]


async def test_the_writer_does_not_rest_while_rows_are_to_be_reclaimed(path: Path) -> None:
    """A step says so itself: its caller gets its result while the writer looks whether it may rest, or has left."""
    async with open_sqlite_store(path) as store:
        said: list[bool] = []
        run = store.writer.run

        def run_and_look(
            arriving: Iterator[Step[apsw.Connection, Any]],
        ) -> Sequence[Sequence[Step[apsw.Connection, Any]]]:
            taken = run(arriving)
            said.append(store.writer.removed)
            return taken

        await _until_resting(store)
        store.writer.run = run_and_look  # type: ignore[method-assign]
        for removes in (_remove_session, _delete_turns, _expire, _add_turns):
            del said[:]
            await removes(store)
            assert said[-1], removes.__name__
            await _until_resting(store)


async def _until_resting(store: SqliteStore) -> None:
    with trio.fail_after(60):
        while store.writer.removed:  # noqa: ASYNC110  no event tells the end
            await trio.sleep(0.001)


async def _remove_session(store: SqliteStore) -> None:
    await store.create_session(a_session("a"), now=T0)
    await store.mark_deleted("a", now=T0)
    await store.remove_deleted("a")


async def _add_turns(store: SqliteStore) -> None:
    await store.create_session(a_session(), now=T0)
    await store.add_turns([an_added_turn("b1"), an_added_turn("b2", parent="b1")], now=T0)


async def _delete_turns(store: SqliteStore) -> None:
    await _add_turns(store)
    await store.delete_turns("s", "b1", now=T0)


async def _expire(store: SqliteStore) -> None:
    await store.create_session(a_session("c"), now=T0)
    await store.delete_expired(now=T0 + timedelta(days=365), limit=9)


async def test_work_between_commits_that_fails_is_tried_again_without_a_step(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_RETRY_S", 0.001)
    failed = 0

    def fail_twice(db: apsw.Connection) -> bool:
        nonlocal failed
        if failed < 2:
            failed += 1
            raise apsw.BusyError
        return reclaim.reclaim_some(db)

    async with open_sqlite_store(path) as store:
        await _until_resting(store)
        monkeypatch.setattr(writer, "reclaim_some", fail_twice)
        await _remove_session(store)
        await _until_resting(store)
    assert failed == 2
