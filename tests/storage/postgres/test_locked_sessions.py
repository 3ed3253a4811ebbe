"""A session that another one has locked: its writes wait, and no others do."""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg
import pytest
import trio
import trio.testing

from service.errors import StoreError
from service.storage.postgres import PostgresStore, sessions, writer
from service.storage.postgres.connections import Db
from service.storage.records import EndResult, SessionPatch
from service.storage.sql_thread import Step
from tests.postgres_server import PostgresServer
from tests.storage.conftest import OpenStore
from tests.storage.postgres.locks import until_something_waits
from tests.storage.rows import T0, a_session, a_turn, ended, said, told
from tests.storage.test_store_owners import a_checkpoint

WAIT_S = 60


class HandedOver:
    """Tells when the writer has handed a step over."""

    def __init__(self, store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_done = threading.Event()
        self._hand_over = store._changing.hand_over
        monkeypatch.setattr(store.writer, "_hand_over", self._note)

    def _note(self, step: Step[Db, Any]) -> bool:
        taken = self._hand_over(step)
        self._is_done.set()
        return taken

    async def wait(self) -> None:
        assert await trio.to_thread.run_sync(self._is_done.wait, WAIT_S)


@pytest.fixture
async def store(open_another: OpenStore) -> AsyncIterator[PostgresStore]:
    """A store with the sessions ``s`` and ``free``."""
    async with open_another() as opened:
        assert isinstance(opened, PostgresStore)
        for name in ("s", "free"):
            await opened.create_session(a_session(name), now=T0)
        yield opened


@pytest.fixture
def handed_over(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> HandedOver:
    return HandedOver(store, monkeypatch)


@contextmanager
def locked(postgres: PostgresServer, store: PostgresStore) -> Iterator[None]:
    """Another process has locked the session ``s``."""
    with psycopg.connect(postgres.url) as other:
        other.execute(f"SELECT FROM {store._schema}.sessions WHERE id = 's' FOR UPDATE".encode())
        yield


async def _title(store: PostgresStore, title: str, session_id: str = "s") -> None:
    await store.update_session(session_id, SessionPatch(title=title), now=T0)


async def test_writes_of_other_sessions_do_not_wait_for_a_locked_one(
    store: PostgresStore, postgres: PostgresServer
) -> None:
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            with locked(postgres, store):
                for title in ("a", "b"):
                    nursery.start_soon(_title, store, title)
                    await trio.testing.wait_all_tasks_blocked()
                await _title(store, "c", "free")
                assert (await store.get_session("s", now=T0)).title is None
    assert (await store.get_session("s", now=T0)).title == "b"
    assert (await store.get_session("free", now=T0)).title == "c"


async def test_of_ends_that_share_a_transaction_only_those_of_a_locked_session_wait(
    store: PostgresStore, postgres: PostgresServer
) -> None:
    turns = [a_turn(f"t-{name}", name) for name in ("free", "s")]
    for turn in turns:
        await store.begin_turn(turn, now=T0)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: Db) -> None:
        hangs.set()
        assert goes_on.wait(WAIT_S)

    results: dict[str, EndResult] = {}
    ends = {turn.session_id: trio.Event() for turn in turns}

    async def end(name: str) -> None:
        results[name] = await store.end_turn(ended(a_turn(f"t-{name}", name)), runs=said("Hi"), now=T0)
        ends[name].set()

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            with locked(postgres, store):
                nursery.start_soon(store._write, hang)
                await trio.to_thread.run_sync(hangs.wait)
                for name in ("s", "free"):
                    nursery.start_soon(end, name)
                    await trio.testing.wait_all_tasks_blocked()
                goes_on.set()
                await ends["free"].wait()
                assert not ends["s"].is_set()
    assert results == {"s": EndResult.KEPT, "free": EndResult.KEPT}


@contextmanager
def locked_turn(postgres: PostgresServer, store: PostgresStore) -> Iterator[None]:
    """Another process has locked the turn ``waits``."""
    with psycopg.connect(postgres.url) as other:
        other.execute(f"SELECT FROM {store._schema}.turns WHERE id = 'waits' FOR UPDATE".encode())
        yield


@pytest.fixture
async def started(store: PostgresStore) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """Starts the turn ``waits``, which is queued; afterwards its growth must be readable."""
    await store.begin_turn(a_turn("t", "s"), now=T0)
    await store.begin_turn(a_turn("waits", "s", parent="t", state="queued"), now=T0)
    yield partial(store.start_turn, "waits", now=T0)
    await store.begin_turn(a_turn("free", "free"), now=T0)
    await store.checkpoint_turns([a_checkpoint("waits", "lo", session="s", after=1)])  # drops what none needs
    assert (await store.get_turn("s", "waits", now=T0)).state == "running"
    assert await told(store, "s", "waits") == ["Hel", "lo"]


async def test_a_checkpoint_that_overtakes_the_start_of_its_turn_is_read_afterwards(
    store: PostgresStore, postgres: PostgresServer, handed_over: HandedOver, started: Callable[[], Awaitable[bool]]
) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: Db) -> None:
        hangs.set()
        assert goes_on.wait(WAIT_S)

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._changing.call, hang)
            await trio.to_thread.run_sync(hangs.wait)
            with locked_turn(postgres, store):
                nursery.start_soon(started)
                await handed_over.wait()
            assert await store.checkpoint_turns([a_checkpoint("waits", "Hel", session="s")]) == []
            goes_on.set()


async def test_a_checkpoint_of_a_turn_whose_start_waits_for_a_lock_is_read_afterwards(
    store: PostgresStore, postgres: PostgresServer, handed_over: HandedOver, started: Callable[[], Awaitable[bool]]
) -> None:
    lost: list[str] = []

    async def checkpoint() -> None:
        lost.extend(await store.checkpoint_turns([a_checkpoint("waits", "Hel", session="s")]))

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            with locked_turn(postgres, store):
                nursery.start_soon(started)
                await handed_over.wait()
                nursery.start_soon(checkpoint)
                await trio.testing.wait_all_tasks_blocked()
                await until_something_waits(postgres)
    assert lost == []


@pytest.mark.parametrize("leaves", ["before it is handed over", "afterwards"])
async def test_a_write_that_waits_is_given_up_when_its_caller_leaves(
    store: PostgresStore,
    postgres: PostgresServer,
    handed_over: HandedOver,
    monkeypatch: pytest.MonkeyPatch,
    leaves: str,
) -> None:
    if leaves != "afterwards":
        monkeypatch.setattr(writer, "LOCK_MAX_S", 1)  # longer than a caller waits that was cancelled
    with trio.fail_after(WAIT_S):
        with locked(postgres, store):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_title, store, "left")
                if leaves == "afterwards":
                    await handed_over.wait()
                await until_something_waits(postgres)
                nursery.cancel_scope.cancel()
            await handed_over.wait()
            await store._change(lambda _: None)  # it has let go of the thread, though the session is locked
            await _title(store, "c", "free")
        await _title(store, "next")
        await store._change(lambda _: None)
    assert (await store.get_session("s", now=T0)).title == "next"


async def test_a_long_change_follows_a_write_that_was_called_before_and_waits(
    store: PostgresStore, postgres: PostgresServer, handed_over: HandedOver
) -> None:
    found: list[str | None] = []

    async def change() -> None:
        record = await store._change(lambda db: sessions.visible(db, "s", T0).record)
        found.append(record.title)

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            with locked(postgres, store):
                nursery.start_soon(_title, store, "before")
                await handed_over.wait()
                nursery.start_soon(change)
                await trio.testing.wait_all_tasks_blocked()
    assert found == ["before"]


async def test_a_write_that_would_wait_fails_while_the_store_is_closed(
    store: PostgresStore, postgres: PostgresServer
) -> None:
    with trio.fail_after(WAIT_S):
        await store._changing.close()
        with locked(postgres, store), pytest.raises(StoreError, match="the database took too long"):
            await _title(store, "never")
        await _title(store, "next")


async def test_two_creations_of_one_session_wait_without_holding_up_others(
    store: PostgresStore, open_another: OpenStore, handed_over: HandedOver
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def create(db: Db) -> None:
        sessions.create(db, a_session("new"), T0)
        begun.set()
        assert goes_on.wait(WAIT_S)
        raise StoreError("The creation fails.")

    async def fail(other: PostgresStore) -> None:
        with pytest.raises(StoreError, match="fails"):
            await other._change(create)

    with trio.fail_after(WAIT_S):
        async with open_another() as other, trio.open_nursery() as nursery:
            assert isinstance(other, PostgresStore)
            nursery.start_soon(fail, other)
            await trio.to_thread.run_sync(begun.wait)
            nursery.start_soon(partial(store.create_session, a_session("new"), now=T0))
            await handed_over.wait()
            await _title(store, "c", "free")
            goes_on.set()
    assert (await store.get_session("new", now=T0)).id == "new"
