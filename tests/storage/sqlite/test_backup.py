"""A backup beside writers that never pause, on disks that get full, and what it says meanwhile."""

from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
import trio

from service.errors import StartupError
from service.storage.records import SessionPatch
from service.storage.sqlite import SqliteStore, database, maintenance, open_sqlite_store, sessions
from service.storage.sqlite.database import BackupProgress
from tests.storage.rows import T0, a_session, a_turn, all_sessions, contents, ended, said
from tests.storage.sqlite.small_disk import SmallDisk


async def _fill_mebibytes(store: SqliteStore, count: int) -> None:
    for n in range(count):
        await store.create_session(a_session(f"large-{n}"), now=T0)
        await store.update_session(f"large-{n}", SessionPatch(title="x" * 1024 * 1024), now=T0)


async def test_a_backup_ends_although_another_connection_writes_at_each_of_its_steps(path: Path) -> None:
    copy = path.with_name("copy.db")
    steps: list[BackupProgress] = []
    async with open_sqlite_store(path) as store:
        await _fill_mebibytes(store, 5)
        before = await contents(store, now=T0)
        with closing(database.connect(path)) as other:

            def write(progress: BackupProgress) -> None:
                steps.append(progress)
                assert len(steps) < 50, "the copy begins anew at each write"
                session = a_session(f"later-{len(steps)}")
                with database.transaction(other):
                    sessions.create(other, session, T0)
                    sessions.update(other, "large-0", SessionPatch(title="y" * 100_000), store._ownership, T0)

            maintenance.backup(path, copy, on_progress=write)
        assert len(await all_sessions(store, now=T0)) == len(before) + len(steps)
    assert maintenance.check(copy) == []
    async with open_sqlite_store(copy) as store:
        assert await contents(store, now=T0) == before, "the copy is not of the moment at which the backup began"
    copied = [step.copied_bytes for step in steps]
    assert copied == sorted(set(copied))
    assert len(copied) > 5
    assert {step.total_bytes for step in steps} == {copied[-1]}
    assert copied[-1] == copy.stat().st_size  # noqa: ASYNC240


async def test_a_backup_beside_a_service_that_never_pauses_writing_is_whole(path: Path) -> None:
    copy = path.with_name("copy.db")
    async with open_sqlite_store(path) as store, trio.open_nursery() as nursery:
        await _fill_mebibytes(store, 4)

        async def write_for_ever() -> None:
            for n in count():
                await store.create_session(a_session(f"s{n}"), now=T0)
                await store.begin_turn(a_turn(f"t{n}", f"s{n}"), now=T0)
                await store.end_turn(ended(a_turn(f"t{n}", f"s{n}")), runs=said("H", "i"), now=T0)

        nursery.start_soon(write_for_ever)
        with trio.fail_after(60):
            await trio.to_thread.run_sync(maintenance.backup, path, copy, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    assert maintenance.check(copy) == []
    async with open_sqlite_store(copy) as store:
        kept = await contents(store, now=T0)
        assert {f"large-{n}" for n in range(4)} <= set(kept)
        turns = [it for _, of_session in kept.values() for it in of_session]
        assert all(list(events) == ([] if turn.is_open else ["H", "i"]) for turn, events in turns)


def test_a_backup_without_space_for_it_is_refused_before_it_begins(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio.run(_open_and_close, path)
    monkeypatch.setattr(maintenance, "_free_bytes", lambda _: 1000)
    copy = path.with_name("copy.db")
    with pytest.raises(
        StartupError, match=r"copy\.db cannot be written: the copy needs 1 MB, and its disk has 0 MB left"
    ):
        maintenance.backup(path, copy)
    assert not copy.exists()


async def test_a_backup_gives_up_before_the_log_fills_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = path.with_name("copy.db")
    async with open_sqlite_store(path) as store:
        await _fill_mebibytes(store, 3)
        with closing(database.connect(path)) as other:

            def write(_: BackupProgress) -> None:
                monkeypatch.setattr(maintenance, "_free_bytes", lambda _: 1_500_000)
                with database.transaction(other):
                    for n in range(3):
                        sessions.update(other, f"large-{n}", SessionPatch(title="y" * 2_000_000), store._ownership, T0)

            with pytest.raises(StartupError, match=r"-wal has grown by \d+ MB since .* has 1 MB left: no copy is made"):
                maintenance.backup(path, copy, on_progress=write)
        await store.create_session(a_session("next"), now=T0)
        assert list(path.parent.glob("*copy*")) + list(path.parent.glob(".lastcall-*")) == []  # noqa: ASYNC240


async def test_a_disk_that_gets_full_during_a_backup_is_told_by_the_name_of_the_copy(path: Path) -> None:
    copy = path.with_name("copies") / "copy.db"
    copy.parent.mkdir()  # noqa: ASYNC240
    async with open_sqlite_store(path) as store:
        await _fill_mebibytes(store, 3)
    disk = SmallDisk(copy.parent, 1024 * 1024)
    try:
        with pytest.raises(StartupError, match=r"copy\.db cannot be written: its disk is full") as refused:
            maintenance.backup(path, copy)
    finally:
        disk.unregister()
    assert "LASTCALL_STORE_URL" not in str(refused.value), "the store is not at fault"
    assert list(copy.parent.iterdir()) == []  # noqa: ASYNC240


async def _open_and_close(path: Path) -> None:
    async with open_sqlite_store(path):
        pass
