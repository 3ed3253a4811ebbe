"""By way of a pooler in transaction mode: each transaction of a store may get another connection of the server.

Here run those tests of the contract whose subject are cancelled calls, owners and lost connections. With the option
``--postgres-pooler`` all tests of the store run in this way.
"""

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import psycopg
import pytest
import trio

from service.errors import StartupError, StoreError
from service.sessions.commands import NewSession, NewTurn
from service.settings import Settings
from service.storage.postgres import PostgresStore, connections, open_postgres_store
from service.storage.postgres.connections import Db
from service.storage.records import EndResult, SessionPatch
from service.storage.store import Store
from service.supervisor import open_service
from tests.pgbouncer import Pooler
from tests.postgres_server import PostgresServer
from tests.sessions.puppet import frames_in, frames_of
from tests.storage import test_store_cancellation as cancellation
from tests.storage.conftest import OpenStore
from tests.storage.postgres.proxy import Proxy, open_proxy
from tests.storage.postgres.test_connections import (
    WAIT_S,
    store,
    test_a_commit_of_unknown_outcome_happens_before_the_next_write_or_never,
    test_a_commit_that_never_arrives_is_no_hindrance_for_long,
    test_a_connection_that_was_lost_between_two_steps_is_made_anew,
    test_a_long_change_whose_caller_left_is_given_up,
    test_of_steps_that_share_a_transaction_only_the_faulty_one_fails,
    test_steps_on_own_turns_share_a_commit,
    test_while_the_server_is_away_calls_fail_and_then_go_on,
)
from tests.storage.rows import T0, a_session, a_turn, ended, said
from tests.storage.test_store_cancellation import _forks_alike
from tests.storage.test_store_owners import (
    test_a_crashed_turn_is_interrupted_with_the_output_and_events_of_its_last_checkpoint,
    test_an_owner_that_was_taken_for_dead_cannot_end_its_turn_again,
    test_of_many_that_recover_at_once_each_turn_is_ended_by_one,
)

__all__ = [
    "_forks_alike",
    "store",
    "test_a_commit_of_unknown_outcome_happens_before_the_next_write_or_never",
    "test_a_commit_that_never_arrives_is_no_hindrance_for_long",
    "test_a_connection_that_was_lost_between_two_steps_is_made_anew",
    "test_a_crashed_turn_is_interrupted_with_the_output_and_events_of_its_last_checkpoint",
    "test_a_long_change_whose_caller_left_is_given_up",
    "test_an_owner_that_was_taken_for_dead_cannot_end_its_turn_again",
    "test_of_many_that_recover_at_once_each_turn_is_ended_by_one",
    "test_of_steps_that_share_a_transaction_only_the_faulty_one_fails",
    "test_steps_on_own_turns_share_a_commit",
    "test_while_the_server_is_away_calls_fail_and_then_go_on",
]


@pytest.fixture
def url(postgres: PostgresServer, postgres_pooler: Pooler) -> str:
    return _url(postgres, postgres_pooler)


def _url(postgres: PostgresServer, pooler: Pooler) -> str:
    return postgres.url_of("lastcall", entrance=pooler.directory)


@pytest.fixture
async def proxy(postgres: PostgresServer, postgres_pooler: Pooler) -> AsyncIterator[Proxy]:
    async with open_proxy(postgres, entrance=postgres_pooler.directory) as opened:
        yield opened


@pytest.fixture
def open_store(postgres: PostgresServer, url: str) -> OpenStore:
    return partial(_open_new_store, postgres, url)


@asynccontextmanager
async def _open_new_store(postgres: PostgresServer, url: str) -> AsyncIterator[Store]:
    with postgres.empty_schema() as schema:
        async with open_postgres_store(url, schema_name=schema) as store:
            yield store


@pytest.fixture
def open_shared(postgres: PostgresServer, url: str) -> Iterator[OpenStore]:
    with postgres.empty_schema() as schema:
        yield partial(open_postgres_store, url, schema_name=schema)


@pytest.mark.usefixtures("_forks_alike", "callers_wait")
@pytest.mark.parametrize("step", ["begin with its session", "end"])
async def test_a_cancelled_step_leaves_all_or_nothing(open_store: OpenStore, step: str) -> None:
    await cancellation.test_a_cancelled_step_leaves_all_or_nothing(open_store, step)


@pytest.mark.usefixtures("callers_wait")
@pytest.mark.parametrize("read", ["search", "path in pages"])
async def test_a_cancelled_read_leaves_the_store_as_it_was(open_store: OpenStore, read: str) -> None:
    await cancellation.test_a_cancelled_read_leaves_the_store_as_it_was(open_store, read)


async def test_transactions_of_a_connection_get_several_connections_of_the_server(store: PostgresStore) -> None:
    """What the other tests here rely on."""

    def server_process(db: Db) -> object:
        return db.execute("SELECT pg_backend_pid()").fetchone()

    both_begun = threading.Barrier(2)

    def with_another(db: Db) -> None:
        server_process(db)
        both_begun.wait(WAIT_S)

    async with trio.open_nursery() as nursery:  # so the pool has two connections to choose from
        nursery.start_soon(store._write, with_another)
        nursery.start_soon(store._read, with_another)

    assert len({await store._write(server_process) for _ in range(30)}) > 1


async def test_a_service_keeps_a_turn_and_the_next_service_replays_it(postgres: PostgresServer, url: str) -> None:
    with postgres.empty_schema() as schema, trio.fail_after(WAIT_S):
        settings = Settings(
            store_url=url,
            store_schema=schema,
            model_url="scripted:?tokens=50&rate=200&first_token_s=0",
            checkpoint_interval_s=0.1,
        )
        async with open_service(settings) as service:
            session = (await service.sessions.create_session(NewSession())).id
            turn, watch = await service.sessions.start_turn(session, NewTurn(text="hi", background=True))
            watch.release()
            ended_turn = await turn.wait_ended()
            frames = frames_of(turn.log)
        async with open_service(settings) as service:
            assert await service.sessions.get_turn(session, turn.id) == ended_turn
            log, _ = await service.sessions.open_events(session, turn.id)
            assert (await frames_in(log), log.closed) == (frames, True)


@pytest.mark.processes
async def test_a_store_goes_on_when_its_pooler_was_started_anew(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BACKOFF_S", 0)
    with postgres.empty_schema() as schema:
        pooler = postgres.start_pooler("restarted")
        try:
            async with open_postgres_store(_url(postgres, pooler), schema_name=schema) as store:
                await store.create_session(a_session(), now=T0)
                await store.begin_turn(a_turn(), now=T0)
                pooler.stop()
                with pytest.raises(StoreError, match="the database does not answer"):
                    await store.update_session("s", SessionPatch(title="never"), now=T0)
                pooler = postgres.start_pooler("restarted")
                assert await store.end_turn(ended(a_turn()), runs=said("Hi"), now=T0) is EndResult.KEPT
                assert (await store.get_session("s", now=T0)).title is None
        finally:
            pooler.stop()


@pytest.mark.processes
async def test_a_pool_without_a_free_connection_refuses_within_its_bound_and_then_goes_on(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BACKOFF_S", 0)
    pooler = postgres.start_pooler("narrow", pool_size=1, query_wait_s=WAIT_S)
    try:
        url = _url(postgres, pooler)
        with postgres.empty_schema() as schema, trio.fail_after(WAIT_S):
            async with open_postgres_store(url, schema_name=schema) as store:
                await store.create_session(a_session(), now=T0)
                with psycopg.connect(url) as other:
                    other.execute("SELECT 1")  # its transaction has the one connection of the pool
                    pooler.set_query_wait(1)
                    with pytest.raises(StoreError, match="no free connection") as refused:
                        await store.update_session("s", SessionPatch(title="never"), now=T0)
                    assert refused.value.retry_after_s == 1
                    pooler.set_query_wait(WAIT_S)
                assert (await store.get_session("s", now=T0)).title is None
    finally:
        pooler.stop()


def test_what_a_pooler_says_at_the_start_is_said_in_words(postgres: PostgresServer, postgres_pooler: Pooler) -> None:
    stranger = postgres.url_of("stranger", entrance=postgres_pooler.directory)
    with pytest.raises(StartupError, match="the server refuses the user or the password"):
        connections.connect_first(stranger, place="here")
