"""A full disk: stored sessions can be read and deleted, and a deletion makes space for new ones."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from service.errors import StoreError
from service.sessions.commands import NewSession, NewTurn
from service.settings import Settings
from service.storage.sqlite import SqliteStore, open_sqlite_store
from service.storage.sqlite.reserve import RESERVE_BYTES
from service.storage.store import Store
from service.supervisor import open_service
from tests.storage.rows import T0, a_session, a_turn, all_sessions, ended, said
from tests.storage.sqlite.small_disk import SmallDisk

MIB = 1024 * 1024
CAP_S = 60


@pytest.fixture
def disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    disk = SmallDisk(path.parent, RESERVE_BYTES + 12 * MIB)
    monkeypatch.setattr(os, "posix_fallocate", disk.allocate)
    yield disk
    disk.unregister()


async def add(store: Store, name: str) -> None:
    """A session with 1 MiB of events."""
    await store.create_session(a_session(name), now=T0)
    turn = a_turn(f"t-{name}", name)
    await store.begin_turn(turn, now=T0)
    texts = [os.urandom(MIB // 8).hex()] * 4
    await store.end_turn(ended(turn, text="".join(texts)), runs=said(*texts), now=T0)


async def fill(store: SqliteStore, disk: SmallDisk) -> list[str]:
    """Add sessions until the disk is full, even after the store has made space. Returns their names."""
    names = []
    for n in range(50):
        name = f"s{n}"
        try:
            await add(store, name)
            names.append(name)
        except StoreError:
            break
    refused = 0
    for n in range(1000):
        # In the writer's thread: so it never runs while the writer has given the reserve to the disk for a write.
        await store._writing.call(lambda _: disk.fill(), makes_space=True)
        try:
            await store.create_session(a_session(f"x{n}"), now=T0)
        except StoreError:
            refused += 1
            if refused == 10:  # the store has made no space in between
                return names
        else:
            refused = 0
        await trio.sleep(0.02)
    pytest.fail("the disk never got full")


async def added_at_last(store: Store, name: str) -> None:
    """Add a session as soon as the disk has space for it."""
    with trio.fail_after(CAP_S):
        while True:
            try:
                await store.create_session(a_session(name), now=T0)
            except StoreError:
                await trio.sleep(0.01)
            else:
                return


async def test_sessions_are_deleted_from_a_full_disk_and_make_space(disk: SmallDisk, path: Path) -> None:
    async with open_sqlite_store(path) as store:
        names = await fill(store, disk)
        assert len(names) >= 5
        for name in names:
            await store.mark_deleted(name, now=T0)
            await store.remove_deleted(name)
        await added_at_last(store, "new")
        with trio.fail_after(CAP_S):
            while disk.free < 4 * MIB:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await add(store, "newer")
    assert (path.parent / "lastcall.db-reserve").stat().st_size == RESERVE_BYTES  # noqa: ASYNC240


async def test_a_step_that_makes_no_space_does_not_use_the_reserve(disk: SmallDisk, path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await fill(store, disk)
        before = len(await all_sessions(store, now=T0))
        for n in range(20):
            with pytest.raises(StoreError, match="full"):
                await store.create_session(a_session(f"more-{n}"), now=T0)
        assert len(await all_sessions(store, now=T0)) == before
        assert (path.parent / "lastcall.db-reserve").stat().st_size == RESERVE_BYTES  # noqa: ASYNC240


async def test_expired_sessions_are_removed_from_a_full_disk(disk: SmallDisk, path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await fill(store, disk)
        later = a_session().expires_at
        assert await store.delete_expired(now=later, limit=100) > 0
        await added_at_last(store, "new")


async def test_another_owner_deletes_too(disk: SmallDisk, path: Path) -> None:
    async with open_sqlite_store(path) as one, open_sqlite_store(path) as other:
        names = await fill(one, disk)
        for name, store in zip(names, [one, other] * len(names), strict=False):
            await store.mark_deleted(name, now=T0)
            await store.remove_deleted(name)
        await added_at_last(other, "new")


async def test_a_session_whose_turn_runs_is_deleted_from_a_full_disk(disk: SmallDisk, path: Path) -> None:
    settings = Settings(
        store_url=f"sqlite:{path}", model_url="scripted:?tokens=100000&rate=1&first_token_s=0", cleanup_timeout_s=0.5
    )
    async with open_service(settings) as service:
        await service.sessions.create_session(NewSession(id="mine"))
        turn, watch = await service.sessions.start_turn("mine", NewTurn(text="hi", background=True))
        watch.release()
        assert isinstance(service.store, SqliteStore)
        await fill(service.store, disk)
        with trio.fail_after(CAP_S):
            await service.sessions.delete_session("mine")
        assert turn.record().reason == "session_deleted"
        assert service.sessions.statistics().ends_not_stored == 0


async def test_a_store_without_a_reserve_is_a_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        await store.mark_deleted("s", now=T0)
        await store.remove_deleted("s")
        assert await all_sessions(store, now=T0) == []
