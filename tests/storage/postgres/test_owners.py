"""Owners on PostgreSQL: beats and leases, by a clock that the tests move."""

import threading
from collections.abc import AsyncIterator
from functools import partial
from types import SimpleNamespace

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from service.errors import OwnedElsewhereError, StoreError
from service.storage.postgres import PostgresStore, beats, open_postgres_store, sessions
from service.storage.postgres.connections import Db
from service.storage.postgres.owners import LEASE_S
from service.storage.records import EndResult, SessionPatch
from tests.postgres_server import PostgresServer
from tests.storage.rows import T0, a_session, a_turn, at, ended, said
from tests.storage.test_store_owners import a_checkpoint


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Owners:
    """Two owners of one store, which beat when the test says so."""

    def __init__(self, schema: str, here: PostgresStore, there: PostgresStore, clock: Clock) -> None:
        self.schema = schema
        self.here = here
        self.there = there
        self.clock = clock

    async def rename(self, store: PostgresStore) -> None:
        """Give the fence of a store to another owner, as a failover may that has lost the store's row."""

        def write(db: Db) -> None:
            db.execute("UPDATE {s}.owners SET nonce = 'another' WHERE fence = %s", (store.fence,))

        await self.here._write(write)

    async def pass_time(self, seconds: int, *, step_s: float = 1) -> int:
        """Let time pass in steps, with a beat of the owner here after each. Returns how many it took for dead."""
        taken = 0
        for _ in range(round(seconds / step_s)):
            self.clock.now_s += step_s
            taken += await self.here.beat()
        return taken


@pytest.fixture
async def two(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Owners]:
    monkeypatch.setattr(beats, "BEAT_S", 3600)
    clock = Clock()
    with postgres.empty_schema() as schema:
        opened = partial(open_postgres_store, postgres.url, schema_name=schema, monotonic=clock)
        async with opened() as here, opened() as there:
            await there.create_session(a_session(), now=T0)
            await there.begin_turn(a_turn(), now=T0)
            await here.beat()
            yield Owners(schema, here, there, clock)


async def _state_of(store: PostgresStore) -> str:
    return (await store.get_turn("s", "t", now=at(1))).state


async def test_an_owner_whose_beats_stand_still_for_a_lease_is_dead(two: Owners) -> None:
    assert await two.pass_time(LEASE_S - 1) == 0
    assert await two.here.recover(now=at(1)) == 0
    with pytest.raises(OwnedElsewhereError):
        await two.here.begin_turn(a_turn("t2"), now=at(1))
    assert await two.pass_time(1) == 1
    assert await two.here.recover(now=at(1)) == 1
    assert await _state_of(two.here) == "interrupted"


async def test_a_take_over_is_told_at_once_and_once(two: Owners) -> None:
    told = 0

    async def count() -> None:
        nonlocal told
        while True:
            await two.here.standing.taken_over.wait()
            told += 1

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            for seconds, taken in ((LEASE_S - 1, 0), (1, 1), (2, 1)):
                await two.pass_time(seconds)
                await trio.testing.wait_all_tasks_blocked()
                assert told == taken
            nursery.cancel_scope.cancel()


async def test_the_next_look_comes_when_the_first_lease_ends(two: Owners) -> None:
    """A look each second alone would find a dead owner up to a second later."""
    await two.pass_time(1)
    await two.there.beat()
    assert await two.pass_time(2, step_s=0.4) == 0
    assert two.here.observer.lease_ends_in_s == pytest.approx(LEASE_S - 1.6), "seen 0.4 s after it was sent"
    for _ in range(LEASE_S - 2):
        assert await two.pass_time(1) == 0
    two.clock.now_s += two.here.observer.lease_ends_in_s or 0
    assert await two.here.beat() == 1
    assert two.here.observer.lease_ends_in_s is None


async def test_the_thread_of_the_beats_is_due_at_the_next_beat_or_at_the_end_of_a_lease(
    two: Owners, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    looks: list[float] = []

    class Looks:
        lease_ends_in_s: float | None = None

        def run_once(self, _: Db) -> None:
            looks.append(now_s)

    monkeypatch.setattr(beats, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(beats, "BEAT_S", 1)
    observer = Looks()
    thread = beats.Beats(two.here._line(), observer, two.here._faults)  # type: ignore[arg-type]  # it sees no owners
    try:
        assert thread.run_housekeeping(idle=True) == 1
        now_s, observer.lease_ends_in_s = 101, 0.25
        assert thread.run_housekeeping(idle=True) == 0.25
        now_s, observer.lease_ends_in_s = 101.25, 5
        assert thread.run_housekeeping(idle=True) == 1
        assert looks == [101, 101.25]
    finally:
        thread.close()


async def test_an_owner_that_was_taken_for_dead_writes_nothing_more(two: Owners) -> None:
    await two.pass_time(LEASE_S)
    assert await _state_of(two.here) == "running"
    with capture_logs() as log:
        # Before the recovery, too: the turn is still open, and in its name.
        assert await two.there.end_turn(ended(a_turn()), runs=said("Hi"), now=at(1)) is EndResult.LOST
    assert set(await two.there.checkpoint_turns([a_checkpoint("t", "Hel")])) == {"t"}
    assert not await two.there.start_turn("t", now=at(1))
    with capture_logs() as further:
        with pytest.raises(StoreError, match="it starts anew") as refused:
            await two.there.create_session(a_session("new"), now=at(1))
        assert refused.value.retry_after_s == 1
    assert [line["fence"] for line in (*log, *further)] == [two.there.fence], "it is logged once"
    assert await two.here.recover(now=at(1)) == 1
    assert await two.there.end_turn(ended(a_turn()), runs=said("Hi"), now=at(1)) is EndResult.LOST
    assert await two.there.count_sessions(status=None, now=at(1)) == 1, "it reads on"


async def test_an_owner_learns_at_its_next_beat_that_it_was_taken_for_dead(two: Owners) -> None:
    await two.pass_time(LEASE_S)
    assert not two.there.ownership.is_lost
    await two.there.beat()
    assert two.there.ownership.is_lost
    with trio.fail_after(60):
        await two.there.standing.lost.wait()
    assert not two.there.standing.is_certain


async def test_an_owner_is_certain_of_its_turns_for_half_a_lease_after_a_beat(two: Owners) -> None:
    assert two.there.standing.is_certain
    two.clock.now_s += LEASE_S / 2
    assert not two.there.standing.is_certain
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.there.standing.wait_beat)
            await two.there.beat()
    assert two.there.standing.is_certain


async def test_a_beat_within_each_lease_keeps_an_owner_alive(two: Owners) -> None:
    for _ in range(4):
        assert await two.pass_time(LEASE_S - 1) == 0
        await two.there.beat()
    assert await two.there.end_turn(ended(a_turn()), runs=said("Hi"), now=at(1)) is EndResult.KEPT


async def test_an_observer_that_was_held_up_begins_the_leases_anew(two: Owners) -> None:
    await two.pass_time(LEASE_S - 1)
    assert await two.pass_time(100, step_s=100) == 0, "it was away itself, and has seen nothing meanwhile"
    assert await two.pass_time(LEASE_S - 1) == 0
    assert await two.pass_time(1) == 1


async def test_an_observer_whose_look_failed_begins_the_leases_anew(two: Owners, postgres: PostgresServer) -> None:
    await two.pass_time(LEASE_S - 1)
    postgres.run(f"ALTER TABLE {two.schema}.beats RENAME TO elsewhere")
    with pytest.raises(StoreError):
        await two.here.beat()
    postgres.run(f"ALTER TABLE {two.schema}.elsewhere RENAME TO beats")
    assert await two.pass_time(LEASE_S) == 0
    assert await two.pass_time(1) == 1


async def test_an_owner_is_not_taken_over_while_a_write_of_it_is_in_flight(two: Owners) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def write(db: Db) -> None:
        db.execute("SELECT 1")
        begun.set()
        assert goes_on.wait(20)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.there._write, write)
            await trio.to_thread.run_sync(begun.wait)
            try:
                assert await two.pass_time(LEASE_S + 1) == 0, "the beats of the one that looks do not wait"
                assert two.here.observer.lease_ends_in_s is None, "it tries again with the next beat, and not at once"
            finally:
                goes_on.set()
    assert await two.pass_time(1) == 1


async def test_a_long_change_does_not_hold_up_a_take_over_and_writes_nothing_afterwards(two: Owners) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    refused: list[StoreError] = []

    def change(db: Db) -> None:
        sessions.update(db, "s", SessionPatch(title="late"), two.there.me, at(1))
        begun.set()
        assert goes_on.wait(20)

    async def change_late() -> None:
        try:
            await two.there._change(change)
        except StoreError as error:
            refused.append(error)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change_late)
            await trio.to_thread.run_sync(begun.wait)
            try:
                assert await two.pass_time(LEASE_S) == 1
            finally:
                goes_on.set()
    assert ["taken for dead" in str(error) for error in refused] == [True]
    assert (await two.here.get_session("s", now=at(1))).title is None


async def test_a_long_write_holds_up_no_beat_of_its_owner(two: Owners) -> None:
    def write(db: Db) -> None:
        db.execute("SELECT 1")
        anyio.from_thread.run(two.there.beat, token=token)

    token = anyio.lowlevel.current_token()
    with trio.fail_after(60):
        await two.there._write(write)


async def test_an_owner_that_a_failover_lost_beats_not_for_the_owner_that_got_its_fence(
    two: Owners, postgres: PostgresServer
) -> None:
    await two.rename(two.there)
    for _ in range(LEASE_S):
        assert await two.pass_time(1) == 0
        await two.there.beat()
    assert two.there.ownership.is_lost
    assert await two.pass_time(1) == 1, "no beat was that of the other owner"
    postgres.cut_connections()
    assert await two.there.beat() == 0, "it asks the database no more"


async def test_an_owner_that_leaves_is_dead_at_once(postgres: PostgresServer) -> None:
    with postgres.empty_schema() as schema:
        async with open_postgres_store(postgres.url, schema_name=schema) as here:
            async with open_postgres_store(postgres.url, schema_name=schema) as there:
                await there.create_session(a_session(), now=T0)
                await there.begin_turn(a_turn(), now=T0)
            assert await here.recover(now=at(1)) == 1
            assert postgres.run(f"SELECT fence FROM {schema}.owners") == [(here.fence,)]
            assert postgres.run(f"SELECT fence FROM {schema}.beats") == [(here.fence,)]
