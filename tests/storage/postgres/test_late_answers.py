"""A server that does not answer: no thread of the store waits for it without a bound of its own."""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

import psycopg
import pytest
import trio

from service.errors import StoreError
from service.storage.postgres import (
    PostgresStore,
    beats,
    connections,
    late_answers,
    open_postgres_store,
    reader,
    running,
)
from service.storage.postgres.connections import connect
from service.storage.records import EndResult, SessionPatch
from service.storage.store_deadline import answered_within
from tests.postgres_server import PostgresServer
from tests.storage.postgres.proxy import Proxy, open_proxy
from tests.storage.rows import T0, a_session, a_turn, at, ended, said
from tests.storage.test_store_owners import a_checkpoint

BOUND_S = 0.3
WAIT_S = 60


@pytest.fixture
async def proxy(postgres: PostgresServer) -> AsyncIterator[Proxy]:
    async with open_proxy(postgres) as opened:
        yield opened


@pytest.fixture
async def store(
    postgres: PostgresServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[PostgresStore]:
    """A store by way of the proxy, with a session and a turn."""
    monkeypatch.setattr(connections, "BACKOFF_S", 0)
    monkeypatch.setattr(late_answers, "LOOK_S", 0.05)
    with postgres.empty_schema() as schema:
        async with open_postgres_store(proxy.url, schema_name=schema) as opened:
            await opened.create_session(a_session(), now=T0)
            await opened.begin_turn(a_turn(), now=T0)
            yield opened


@contextmanager
def short_bounds(store: PostgresStore, *, commits_only: bool = False) -> Iterator[None]:
    """Within the context the server has a short time for each answer. The calls before and after it may take longer."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(connections, "ANSWER_GRACE_S", 0)
        patched.setattr(connections, "COMMIT_MAX_S", BOUND_S)
        if not commits_only:
            for module in (reader, beats):
                patched.setattr(module, "STATEMENT_MAX_S", BOUND_S)
            for thread in (store._writing, store._changing):
                patched.setattr(thread._batches, "_statement_timeout_s", BOUND_S)
        yield


async def _title(store: PostgresStore, title: str) -> None:
    await store.update_session("s", SessionPatch(title=title), now=T0)


Call = Callable[[], Awaitable[object]]


def _calls(store: PostgresStore) -> list[Call]:
    """A call for each thread."""
    return [
        partial(_title, store, "new"),
        partial(store.delete_expired, now=T0, limit=1),
        partial(store.get_session, "s", now=T0),
        partial(store.list_turns, "s", limit=1, after=None, now=T0),
        store.beat,
    ]


async def _do_all(calls: list[Call]) -> list[StoreError]:
    errors: list[StoreError] = []

    async def do(call: Call) -> None:
        try:
            await call()
        except StoreError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(do, call)
    return errors


async def test_each_thread_goes_on_over_a_new_connection_when_the_old_one_is_silent(
    store: PostgresStore, proxy: Proxy
) -> None:
    await _do_all(_calls(store))  # each thread has a connection
    proxy.silence()
    with trio.fail_after(WAIT_S):
        with short_bounds(store):
            await _do_all(_calls(store))
        assert await _do_all(_calls(store)) == []
        assert await store.checkpoint_turns([a_checkpoint("t", "Hel")]) == []
        assert await store.end_turn(ended(a_turn()), runs=said("Hi"), now=at(1)) is EndResult.KEPT
    assert (await store.get_session("s", now=T0)).title == "new"


async def test_a_commit_whose_answer_never_arrives_is_an_unknown_outcome_and_not_an_acknowledgement(
    store: PostgresStore, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = connections.Db.commit

    def commit_unheard(db: connections.Db) -> None:
        if db.is_open:
            proxy.silence()
        commit(db)

    with trio.fail_after(WAIT_S):
        with short_bounds(store, commits_only=True), monkeypatch.context() as patched:
            patched.setattr(connections.Db, "commit", commit_unheard)
            with pytest.raises(StoreError, match="the database does not answer"):
                await _title(store, "unheard")
        epoch = store.me.epoch
        await store._write(lambda _: None)
        await _title(store, "next")
    assert store.me.epoch == epoch + 1
    assert (await store.get_session("s", now=T0)).title == "next"


async def test_no_caller_waits_longer_than_its_own_bound_while_the_network_is_cut(
    store: PostgresStore, proxy: Proxy
) -> None:
    await _do_all(_calls(store))
    proxy.silence()
    proxy.silences_new = True
    late: list[StoreError] = []
    with short_bounds(store):
        for call in _calls(store)[:-1]:
            with trio.fail_after(WAIT_S), pytest.raises(StoreError) as refused, answered_within(BOUND_S / 3):
                await call()
            late.append(refused.value)
    assert {str(error) for error in late} == {"The store did not answer in time."}
    proxy.silences_new = False
    await proxy.cut()  # the attempts to connect that began before, too
    with trio.fail_after(WAIT_S):
        while await _do_all(_calls(store)):  # their steps may fail
            pass


async def test_a_step_whose_caller_has_left_holds_up_the_thread_for_a_short_time_only(
    store: PostgresStore, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its statement would be late: the cancel of it, which was served, had no effect."""
    monkeypatch.setattr(reader, "STATEMENT_MAX_S", 3600)
    monkeypatch.setattr(running, "_AGAIN_S", 0.05)
    await store.get_session("s", now=T0)
    proxy.silence()
    with trio.fail_after(WAIT_S):
        with trio.move_on_after(0.1):
            await store.get_session("s", now=T0)
        assert (await store.get_session("s", now=T0)).title is None


async def test_an_attempt_to_connect_to_a_server_that_says_nothing_has_a_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, trio.fail_after(WAIT_S):
        url = f"postgresql://lastcall@127.0.0.1:{mute.getsockname()[1]}/postgres?connect_timeout=2"
        with pytest.raises(psycopg.OperationalError, match="timeout expired"):
            await trio.to_thread.run_sync(connect, url)


async def test_a_store_whose_server_is_silent_closes_within_its_bound(postgres: PostgresServer, proxy: Proxy) -> None:
    with postgres.new_schema() as schema:
        opened = PostgresStore(proxy.url, schema_name=schema, address=None)
        await opened.open()
        await opened.create_session(a_session(), now=T0)
        proxy.silence()
        with trio.fail_after(WAIT_S), trio.move_on_after(0.2) as closing:
            await opened.aclose()
        assert closing.cancelled_caught
        await opened.aclose()
