"""Acknowledged data is on the disk, and not only in a cache of the operating system."""

import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from service.storage.records import SessionPatch
from service.storage.sqlite import SqliteStore, database, open_sqlite_store, writer
from tests.storage.rows import T0, Contents, a_session, a_turn, contents, ended, said
from tests.storage.sqlite.lossy_disk import LossyDisk
from tests.storage.sqlite.test_sqlite_store import writer_held_up
from tests.storage.test_store_owners import a_checkpoint


@pytest.fixture
def disk() -> Iterator[LossyDisk]:
    disk = LossyDisk()
    yield disk
    disk.unregister()


async def _checkpoint(store: SqliteStore) -> None:
    await store.checkpoint_turns([a_checkpoint("t2", "Half a")])


STEPS: list[Callable[[SqliteStore], Awaitable[object]]] = [
    lambda store: store.create_session(a_session(), now=T0),
    lambda store: store.begin_turn(a_turn(texts=["x" * 9000]), now=T0),
    lambda store: store.end_turn(
        ended(a_turn(texts=["x" * 9000]), text="x" * 9000), runs=said("x", "x" * 8999), now=T0
    ),
    lambda store: store.update_session("s", SessionPatch(title="new"), now=T0),
    lambda store: store.create_session(a_session("other"), now=T0),
    lambda store: store.begin_turn(a_turn("t2", parent="t", state="queued"), now=T0),
    lambda store: store.start_turn("t2", now=T0),
    lambda store: store.begin_turn(a_turn("t3", "third"), now=T0, creates=a_session("third")),
    _checkpoint,
    lambda store: store.mark_deleted("other", now=T0),
    lambda store: store.remove_deleted("other"),
]


async def _lost(disk: LossyDisk, path: Path, luck: random.Random | None) -> int:
    """The number of steps after which a power cut would lose acknowledged data."""
    lost = 0
    async with open_sqlite_store(path) as store:
        for number, step in enumerate(STEPS):
            await step(store)
            after = path.parent / f"after-{number}"
            after.mkdir()
            disk.cut_the_power(path, after, luck)
            lost += await _left(after / path.name) != await contents(store, now=T0)
    return lost


async def _left(path: Path) -> Contents | None:
    if not await trio.Path(path).exists():
        return None
    async with open_sqlite_store(path) as store:
        return await contents(store, now=T0)


@pytest.mark.parametrize("checkpoint_pages", [1, 1000])
@pytest.mark.parametrize("luck", [None, random.Random(1), random.Random(2)])
async def test_nothing_acknowledged_is_lost_in_a_power_cut(
    disk: LossyDisk, path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_pages: int, luck: random.Random | None
) -> None:
    monkeypatch.setattr(writer, "_CHECKPOINT_PAGES", checkpoint_pages)
    monkeypatch.setattr(writer, "_HOUSEKEEPING_INTERVAL_S", 0)
    assert await _lost(disk, path, luck) == 0


@pytest.mark.parametrize("synchronous", ["NORMAL", "OFF"])
async def test_the_disk_does_lose_what_is_not_synced(
    disk: LossyDisk, path: Path, monkeypatch: pytest.MonkeyPatch, synchronous: str
) -> None:
    """The proof that the test above can fail: with less than ``synchronous=FULL`` data is lost."""
    monkeypatch.setattr(database, "SYNCHRONOUS", synchronous)
    assert await _lost(disk, path, None) > 0


@pytest.mark.usefixtures("one_commit")
async def test_steps_that_wait_together_share_a_sync(disk: LossyDisk, path: Path) -> None:
    async with open_sqlite_store(path) as store:
        await store.create_session(a_session(), now=T0)
        before = disk.syncs
        async with trio.open_nursery() as nursery, writer_held_up(store):
            for n in range(100):
                nursery.start_soon(lambda n: store.begin_turn(a_turn(f"t{n}"), now=T0), n)
            await trio.testing.wait_all_tasks_blocked()
        assert disk.syncs - before < 5
