"""The store survives a bad disk: clear errors, reads that go on, and no restart once the disk is well."""

import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path

import apsw
import pytest
import structlog
import trio

from service.errors import (
    HeadMovedError,
    ResourcesExhaustedError,
    SessionNotFoundError,
    StartupError,
    StoreError,
    TurnNotFoundError,
)
from service.storage.records import EndResult
from service.storage.sqlite import SqliteStore, database, open_sqlite_store, sessions
from service.storage.sqlite.open_files import OpenFiles
from service.storage.sqlite.ownership import Ownership
from service.storage.sqlite.schema import SCRIPTS
from service.storage.sqlite.writer import Writer
from tests.storage.rows import T0, a_session, a_turn, all_sessions, contents, ended, said, told
from tests.storage.sqlite.faulty_disk import FaultyDisk


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    disk = FaultyDisk()
    yield disk
    disk.running.set()
    disk.unregister()


WRITE_FAULTS = {
    apsw.FullError: "disk is full",
    apsw.IOError: "disk refuses",
    apsw.ReadOnlyError: "cannot be written to",
}


@pytest.mark.parametrize("fault", WRITE_FAULTS)
async def test_a_disk_that_does_not_write_fails_writes_until_it_does(
    disk: FaultyDisk, path: Path, fault: type[apsw.Error]
) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        before = await contents(store, now=T0)
        disk.write_fault = fault
        for _ in range(2):
            with pytest.raises(StoreError, match=WRITE_FAULTS[fault]) as failed:
                await store.end_turn(ended(a_turn(), text="x" * 100_000), runs=said("x" * 100_000), now=T0)
            assert failed.value.retry_after_s is not None, "it may pass by itself"
            assert await contents(store, now=T0) == before, "reads go on, and see nothing half-done"
        disk.write_fault = None
        assert await store.end_turn(ended(a_turn()), runs=said("Hi"), now=T0) is EndResult.KEPT
        assert await told(store, "s", "t") == ["Hi"]
    async with open_sqlite_store(path) as store:
        assert (await store.get_turn("s", "t", now=T0)).state == "completed"


async def test_a_fault_that_lasts_is_in_the_log_every_ten_seconds(disk: FaultyDisk, path: Path) -> None:
    now = 1000.0
    async with open_sqlite_store(path, monotonic=lambda: now) as store:
        disk.write_fault = apsw.FullError
        with structlog.testing.capture_logs() as log:
            for seconds, lines in ((0, 1), (9.9, 1), (0.1, 2), (9.9, 2), (50, 3)):
                now += seconds
                with pytest.raises(StoreError):
                    await store.create_session(a_session(), now=T0)
                assert len(log) == lines
        disk.write_fault = None


def test_housekeeping_is_done_in_its_interval_while_steps_keep_arriving(path: Path) -> None:
    now = 1000.0
    owners = Ownership(path.with_name(f"{path.name}-owners"))
    writer = Writer(OpenFiles(path), owners, address=None, opened_at=0, monotonic=lambda: now)
    writer.open()
    done: list[bool] = []
    with closing(owners), closing(writer):
        for seconds in (0, 0.05, 0.04, 0.02):
            now += seconds
            writer.removed = True
            writer.run_housekeeping(idle=False)
            done.append(not writer.removed)
    assert done == [True, False, False, True]


async def test_the_error_of_a_fault_has_no_path_and_the_log_has_it_once(disk: FaultyDisk, path: Path) -> None:
    async with open_sqlite_store(path) as store:
        disk.write_fault = apsw.FullError
        with structlog.testing.capture_logs() as log:
            for _ in range(3):
                with pytest.raises(StoreError) as failed:
                    await store.create_session(a_session(), now=T0)
                assert str(failed.value) == "The store failed: the disk is full; free some space."
            disk.write_fault = apsw.IOError
            with pytest.raises(StoreError):
                await store.create_session(a_session(), now=T0)
        assert [line["store"] for line in log] == [f"sqlite:{path}"] * 2, "once for each kind"
        disk.write_fault = None


async def test_words_of_sqlite_are_for_the_log(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        with structlog.testing.capture_logs() as log, pytest.raises(StoreError) as failed:
            await store._looking.call(lambda db: db.execute("SELECT secret FROM nowhere"))
        assert str(failed.value) == "The store failed: the log says why."
        assert "nowhere" in log[0]["sqlite"]


@pytest.mark.parametrize("fault", [apsw.CantOpenError, apsw.IOError])
@pytest.mark.parametrize("refusal", [errno.EMFILE, errno.ENFILE])
async def test_a_store_for_which_no_descriptor_is_left_says_so(
    disk: FaultyDisk, path: Path, fault: type[apsw.Error], refusal: int
) -> None:
    async with open_sqlite_store(path) as store:
        disk.write_fault, disk.system_error = fault, refusal
        with pytest.raises(ResourcesExhaustedError, match="no file descriptor left"):
            await store.create_session(a_session(), now=T0)
        disk.write_fault = None


async def test_a_disk_that_does_not_read_fails_reads_until_it_does(disk: FaultyDisk, path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
    async with open_sqlite_store(path) as store:
        disk.read_fault = apsw.IOError
        with pytest.raises(StoreError, match="disk refuses"):
            await store.get_session("s", now=T0)
        disk.read_fault = None
        assert (await store.get_session("s", now=T0)).id == "s"


@pytest.mark.usefixtures("one_commit")
@pytest.mark.parametrize("place", [0, 4, 9])
async def test_one_step_that_fails_does_not_take_along_those_that_share_its_commit(path: Path, place: int) -> None:
    async with open_sqlite_store(path) as store:
        refused: list[int] = []

        async def create(number: int) -> None:
            try:
                await store.create_session(a_session("refuse" if number == place else f"s{number}"), now=T0)
            except StoreError:
                refused.append(number)

        await store._writing.call(
            lambda db: db.execute(
                "CREATE TEMP TRIGGER t BEFORE INSERT ON sessions WHEN new.id = 'refuse' "
                "BEGIN SELECT raise(ABORT, ''); END"
            )
        )
        async with in_one_commit(store, path) as start_soon:
            for number in range(10):
                await start_soon(partial(create, number))
        assert refused == [place]
        assert len(await all_sessions(store, now=T0)) == 9


@pytest.mark.usefixtures("one_commit")
@pytest.mark.parametrize("place", [0, 4, 9])
@pytest.mark.parametrize("refusal", [SessionNotFoundError("s"), HeadMovedError("t")], ids=["not found", "head moved"])
async def test_a_step_that_refuses_after_it_has_written_leaves_nothing_behind(
    path: Path, place: int, refusal: Exception
) -> None:
    def write_and_refuse(db: apsw.Connection) -> None:
        sessions.create(db, a_session("refused"), T0)
        raise refusal

    async with open_sqlite_store(path) as store, in_one_commit(store, path) as start_soon:
        told: list[Exception] = []

        async def be_refused() -> None:
            try:
                await store._writing.call(write_and_refuse)
            except (SessionNotFoundError, HeadMovedError) as error:
                told.append(error)

        for number in range(10):
            if number == place:
                await start_soon(be_refused)
            else:
                await start_soon(partial(store.create_session, a_session(f"s{number}"), now=T0))
    async with open_sqlite_store(path) as store:
        kept = [session.id for session in await all_sessions(store, now=T0)]
    assert told == [refusal]
    assert sorted(kept) == [f"s{number}" for number in range(10) if number != place]


@pytest.mark.usefixtures("one_commit")
async def test_a_refusing_step_does_not_undo_the_steps_that_share_its_commit(path: Path) -> None:
    runs: list[int] = []

    def write(db: apsw.Connection, number: int) -> None:
        runs.append(number)
        sessions.create(db, a_session(f"s{number}"), T0)

    async def refused(call: Callable[[], Awaitable[object]], refusal: type[Exception]) -> None:
        with pytest.raises(refusal):
            await call()

    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        stale = partial(store.begin_turn, a_turn("stale"), now=T0, head=None)
        lost = partial(store.begin_turn, a_turn("lost", "nowhere"), now=T0)
        orphan = partial(store.begin_turn, a_turn("orphan", parent="nowhere"), now=T0)
        async with in_one_commit(store, path) as start_soon:
            await start_soon(partial(store._writing.call, partial(write, number=0)))
            await start_soon(partial(refused, stale, HeadMovedError))
            await start_soon(partial(store._writing.call, partial(write, number=1)))
            await start_soon(partial(refused, lost, SessionNotFoundError))
            await start_soon(partial(refused, orphan, TurnNotFoundError))
            await start_soon(partial(store._writing.call, partial(write, number=2)))
        assert runs == [0, 1, 2], "each step ran once"
        assert {session.id for session in await all_sessions(store, now=T0)} == {"s", "s0", "s1", "s2"}
        assert (await store.get_session("s", now=T0)).open_turns == 1


@asynccontextmanager
async def in_one_commit(
    store: SqliteStore, path: Path
) -> AsyncIterator[Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]]:
    """Gives a function that starts a call to the store; all calls wait, and share a commit on leaving."""
    with closing(apsw.Connection(str(path))) as other:
        other.set_busy_timeout(5000)  # the store may be tidying up
        other.execute("BEGIN IMMEDIATE")
        commits = store.writer.commits
        async with trio.open_nursery() as nursery:

            async def start_soon(call: Callable[[], Awaitable[object]]) -> None:
                nursery.start_soon(call)
                await trio.testing.wait_all_tasks_blocked()

            yield start_soon
            other.execute("ROLLBACK")
    assert store.writer.commits <= commits + 2, "the calls did not share a commit"


async def test_a_lock_that_another_process_holds_fails_writes_until_it_is_given_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOCK_WAIT_S", 0.05)
    async with open_sqlite_store(path) as store:
        other = apsw.Connection(str(path))
        other.set_busy_timeout(5000)  # the store may be tidying up
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process holds its lock"):
            await store.create_session(a_session(), now=T0)
        assert await all_sessions(store, now=T0) == []
        other.execute("ROLLBACK")
        await store.create_session(a_session(), now=T0)
        other.close()


async def test_a_caller_that_leaves_while_another_process_holds_the_lock_leaves_nothing(path: Path) -> None:
    async with open_sqlite_store(path) as store:
        other = apsw.Connection(str(path))
        other.set_busy_timeout(5000)  # the store may be tidying up
        other.execute("BEGIN IMMEDIATE")
        with trio.move_on_after(0.05) as waiting:
            await store.create_session(a_session(), now=T0)
        assert waiting.cancelled_caught
        other.execute("ROLLBACK")
        other.close()
        await store.create_session(a_session("other"), now=T0)
        assert [session.id for session in await all_sessions(store, now=T0)] == ["other"]


async def test_nothing_is_acknowledged_before_the_disk_has_it_and_reads_go_on_meanwhile(
    disk: FaultyDisk, path: Path
) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session("before"), now=T0)
        disk.running.clear()
        async with trio.open_nursery() as waiting:
            waiting.start_soon(partial(store.create_session, a_session(), now=T0))
            await trio.to_thread.run_sync(disk.hanging.wait)
            waiting.cancel_scope.cancel()
        assert waiting.cancel_scope.cancelled_caught
        assert [session.id for session in await all_sessions(store, now=T0)] == ["before"]
        disk.running.set()
        await store.create_session(a_session("after"), now=T0)
        assert len(await all_sessions(store, now=T0)) == 3, "what had begun was done all the same"


async def test_a_call_in_a_slow_commit_can_be_cancelled(disk: FaultyDisk, path: Path) -> None:
    async with open_sqlite_store(path) as store:
        disk.running.clear()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: store.create_session(a_session(), now=T0))
                await trio.to_thread.run_sync(disk.hanging.wait)
                nursery.cancel_scope.cancel()
        disk.running.set()


async def test_closing_does_not_wait_for_a_disk_that_hangs(disk: FaultyDisk, path: Path) -> None:
    with trio.fail_after(60):
        async with open_sqlite_store(path, close_timeout_s=0.05) as store:
            disk.running.clear()
            with trio.move_on_after(0.01):
                await store.create_session(a_session(), now=T0)
    disk.running.set()


@pytest.mark.processes
def test_a_process_whose_disk_hangs_ends(path: Path) -> None:
    script = """
import sys, trio
from service.storage.sqlite import open_sqlite_store
from tests.storage.rows import T0, a_session
from tests.storage.sqlite.faulty_disk import FaultyDisk

async def main():
    disk = FaultyDisk()
    async with open_sqlite_store(sys.argv[1], close_timeout_s=0.05) as store:
        disk.running.clear()
        with trio.move_on_after(0.01):
            await store.create_session(a_session(), now=T0)

trio.run(main)
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=120)


# Files that cannot be opened


def _damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(os.urandom(4096))


async def _refused(path: Path) -> str:
    with pytest.raises(StartupError) as refused:
        async with open_sqlite_store(path):
            pytest.fail("it was opened")
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("offset", [0, 4096, 12 * 4096])
async def test_a_damaged_file_is_refused(path: Path, offset: int) -> None:
    async with open_sqlite_store(path) as store:
        for n in range(20):
            await store.create_session(a_session(f"s{n}"), now=T0)
    _damage(path, offset)
    assert "restore a backup" in await _refused(path)


async def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    await trio.Path(path).write_text("A shopping list. " * 1000)
    assert "no database" in await _refused(path)


async def test_a_database_of_something_else_is_refused_and_left_alone(path: Path) -> None:
    db = apsw.Connection(str(path))
    db.execute("CREATE TABLE recipes (name)")
    db.close()
    assert "of something else" in await _refused(path)
    db = apsw.Connection(str(path))
    assert db.execute("SELECT name FROM sqlite_schema").fetchall() == [("recipes",)]
    db.close()


async def test_a_file_of_a_newer_version_is_refused(path: Path) -> None:
    async with open_sqlite_store(path):
        pass
    db = apsw.Connection(str(path))
    db.pragma("user_version", len(SCRIPTS) + 1)
    db.close()
    assert "newer version" in await _refused(path)


async def test_a_file_that_cannot_be_written_is_refused(disk: FaultyDisk, path: Path) -> None:
    async with open_sqlite_store(path):
        pass
    disk.read_only = True
    assert "cannot be written" in await _refused(path)


async def test_a_directory_that_is_not_there_is_refused(path: Path) -> None:
    assert "No such file or directory" in await _refused(path / "nowhere" / "lastcall.db")


async def test_a_directory_is_no_file(path: Path) -> None:
    assert "cannot be opened" in await _refused(path.parent)
