"""Connections that are lost, and servers that are away: nothing of a lost step happens after the next write."""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import psycopg
import pytest
import trio
import trio.testing

from service.errors import StoreError
from service.storage.postgres import PostgresStore, connections, open_postgres_store, owners, search, sessions
from service.storage.postgres.connections import Db
from service.storage.records import EndResult, SessionPatch
from service.storage.sql_thread import SqlThread
from tests.postgres_server import PostgresServer
from tests.storage.postgres.locks import until_something_waits
from tests.storage.postgres.proxy import Proxy, open_proxy
from tests.storage.rows import T0, a_session, a_turn, at, ended, said
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_owners import a_checkpoint

WAIT_S = 60


@pytest.fixture
async def proxy(postgres: PostgresServer) -> AsyncIterator[Proxy]:
    async with open_proxy(postgres) as opened:
        yield opened


@pytest.fixture
async def store(
    postgres: PostgresServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[PostgresStore]:
    """A store whose connections go by way of the proxy, with a session."""
    monkeypatch.setattr(connections, "BACKOFF_S", 0)
    with postgres.empty_schema() as schema:
        async with open_postgres_store(proxy.url, schema_name=schema) as opened:
            await opened.create_session(a_session(), now=T0)
            yield opened


async def _title(store: PostgresStore, title: str) -> None:
    await store.update_session("s", SessionPatch(title=title), now=T0)


async def test_a_connection_that_was_lost_between_two_steps_is_made_anew(
    store: PostgresStore, postgres: PostgresServer, proxy: Proxy
) -> None:
    losses: list[Callable[[], Awaitable[None]]] = [
        partial(trio.to_thread.run_sync, postgres.cut_connections),
        proxy.cut,
    ]
    for lose in losses:
        await _title(store, "a")
        await store.list_turns("s", limit=1, after=None, now=T0)
        await lose()
        await _title(store, "b")
        assert (await store.get_session("s", now=T0)).title == "b"
        assert (await store.list_turns("s", limit=1, after=None, now=T0)).data == ()
        await store.delete_expired(now=T0, limit=1)


@pytest.mark.parametrize("kind", ["search", "listing by metadata", "search for an item", "fork"])
async def test_a_read_of_many_steps_goes_on_over_a_connection_that_was_lost_before(
    store: PostgresStore, postgres: PostgresServer, kind: str
) -> None:
    await _title(store, "a word")
    await store.add_turns([an_added_turn("t")], now=T0)
    await store._read(lambda db: db.execute("SELECT 1"))
    await trio.to_thread.run_sync(postgres.cut_connections)
    with trio.fail_after(WAIT_S):
        match kind:
            case "search":
                page = await store.search_sessions("word", limit=9, after=None, status=None, now=T0)
                assert [match.session.id for match in page.data] == ["s"]
            case "listing by metadata":
                listed = await store.list_sessions(limit=9, after=None, status=None, now=T0, metadata={"a": "b"})
                assert listed.data == ()
            case "search for an item":
                assert (await store.find_item("s", "t-out", now=T0)).id == "t"
            case _:
                assert (await store.fork_session("s", at="t", copy_id="copy", now=T0)).message_count == 2


async def test_a_read_is_answered_whatever_the_server_says_of_its_commit(store: PostgresStore) -> None:
    """As an immediate shutdown does, whose warning may come with the answer to a commit."""
    assert await store._read(lambda db: db.execute("COMMIT").statusmessage) == "COMMIT", "the second commit warns"


async def test_a_search_whose_connection_is_lost_within_a_step_fails(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(index: search._PostgresIndex) -> None:
        index._db.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    monkeypatch.setattr(search._PostgresIndex, "newest", lose)
    with trio.fail_after(WAIT_S), pytest.raises(StoreError, match="the database does not answer"):
        await store.search_sessions("word", limit=9, after=None, status=None, now=T0)


async def test_while_the_server_is_away_calls_fail_and_then_go_on(store: PostgresStore, proxy: Proxy) -> None:
    await store.begin_turn(a_turn(), now=T0)
    proxy.is_away = True
    await proxy.cut()
    calls: list[Callable[[], object]] = [
        partial(_title, store, "never"),
        partial(store.get_session, "s", now=T0),
        partial(store.count_sessions, status=None, now=T0),
        partial(store.delete_expired, now=T0, limit=1),
        partial(store.checkpoint_turns, [a_checkpoint("t", "Hel")]),
        store.beat,
    ]
    for call in calls:
        with pytest.raises(StoreError, match="the database does not answer") as refused:
            await call()  # type: ignore[misc]
        assert refused.value.retry_after_s == 1
    proxy.is_away = False
    assert (await store.get_session("s", now=T0)).title is None
    assert await store.checkpoint_turns([a_checkpoint("t", "Hel")]) == []
    assert await store.end_turn(ended(a_turn()), runs=said("Hi"), now=T0) is EndResult.KEPT


async def test_nobody_is_taken_over_because_the_server_was_away(
    store: PostgresStore, proxy: Proxy, postgres: PostgresServer
) -> None:
    now_s = 0.0
    schema = store._schema
    async with open_postgres_store(proxy.url, schema_name=schema, monotonic=lambda: now_s) as other:
        await store.begin_turn(a_turn(), now=T0)
        await other.beat()
        proxy.is_away = True
        await proxy.cut()
        for _ in range(20):
            now_s += 1
            with pytest.raises(StoreError):
                await other.beat()
        proxy.is_away = False
        for _ in range(3):
            now_s += 1
            assert await other.beat() == 0
        assert await other.recover(now=at(1)) == 0
    assert await store.end_turn(ended(a_turn()), runs=said("Hi"), now=T0) is EndResult.KEPT


async def test_a_commit_of_unknown_outcome_happens_before_the_next_write_or_never(
    store: PostgresStore, proxy: Proxy, postgres: PostgresServer
) -> None:
    proxy.hold(b"COMMIT\0")
    with trio.fail_after(WAIT_S):
        with pytest.raises(StoreError, match="the database does not answer"):
            await _title(store, "held")
        async with trio.open_nursery() as nursery:
            done = trio.Event()

            async def write_next() -> None:
                await _title(store, "next")
                done.set()

            nursery.start_soon(write_next)
            # The commit has not reached the server yet. The next write waits for what becomes of it.
            await until_something_waits(postgres)
            assert not done.is_set()
            assert (await store.get_session("s", now=T0)).title is None
            proxy.released.set()
            await done.wait()
    assert (await store.get_session("s", now=T0)).title == "next"
    assert store.me.epoch == 1


async def test_a_commit_that_never_arrives_is_no_hindrance_for_long(store: PostgresStore, proxy: Proxy) -> None:
    proxy.hold(b"COMMIT\0")
    with pytest.raises(StoreError):
        await _title(store, "held")
    # As the server does with a connection that is idle within its transaction, after some seconds.
    await proxy.cut()
    await _title(store, "next")
    proxy.released.set()
    await trio.testing.wait_all_tasks_blocked()
    assert (await store.get_session("s", now=T0)).title == "next"


async def test_a_write_after_an_unknown_outcome_does_not_wait_for_a_long_change_which_is_done_again(
    store: PostgresStore,
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    epochs: list[int] = []

    def change(db: Db) -> None:
        epochs.append(store.me.epoch)
        sessions.update(db, "s", SessionPatch(metadata={"changed": str(len(epochs))}), store.me, T0)
        begun.set()
        assert goes_on.wait(WAIT_S)

    with trio.fail_after(WAIT_S):
        await store.create_session(a_session("other"), now=T0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._change, change)
            await trio.to_thread.run_sync(begun.wait)
            store.ownership.doubt()
            await store.update_session("other", SessionPatch(title="next"), now=T0)
            goes_on.set()
    assert epochs == [0, 1], "its first transaction was of an epoch that has passed"
    assert (await store.get_session("s", now=T0)).metadata == {"changed": "2"}
    assert (await store.get_session("other", now=T0)).title == "next"


async def test_a_write_after_an_unknown_outcome_waits_for_others_within_a_bound(
    store: PostgresStore, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.fail_after(WAIT_S):
        with psycopg.connect(postgres.url) as other, monkeypatch.context() as hurried:
            hurried.setattr(owners, "RENEW_MAX_S", 0.1)
            other.execute(f"SELECT FROM {store._schema}.owners FOR SHARE".encode())
            store.ownership.doubt()
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(_fails_slowly, store)
        await _title(store, "next")
    assert (await store.get_session("s", now=T0)).title == "next"
    assert store.me.epoch == 1


async def _fails_slowly(store: PostgresStore) -> None:
    with pytest.raises(StoreError, match="the database took too long"):
        await store.checkpoint_turns([a_checkpoint("t", "Hel")])


async def test_a_long_change_whose_caller_left_is_given_up(store: PostgresStore, postgres: PostgresServer) -> None:
    begun = threading.Event()

    def change(db: Db) -> None:
        sessions.update(db, "s", SessionPatch(title="late"), store.me, T0)
        begun.set()
        db.execute("SELECT pg_sleep(60)")

    with trio.fail_after(WAIT_S / 2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._change, change)
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
        await _title(store, "next")  # the statement was cancelled, so it holds no lock for a minute
        await store._change(lambda _: None)
    assert (await store.get_session("s", now=T0)).title == "next"


async def test_a_long_change_whose_caller_left_after_its_last_statement_is_given_up(store: PostgresStore) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def change(db: Db) -> None:
        sessions.update(db, "s", SessionPatch(title="late"), store.me, T0)
        begun.set()
        assert goes_on.wait(WAIT_S)

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._change, change)
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
        goes_on.set()
        await store._change(lambda _: None)
    assert (await store.get_session("s", now=T0)).title is None


async def test_a_long_change_whose_caller_left_between_two_statements_does_no_more_of_them(
    store: PostgresStore,
) -> None:
    begun, goes_on, went_on = threading.Event(), threading.Event(), threading.Event()

    def change(db: Db) -> None:
        sessions.update(db, "s", SessionPatch(title="late"), store.me, T0)
        begun.set()
        assert goes_on.wait(WAIT_S)
        db.execute("SELECT 1")
        went_on.set()

    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._change, change)
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
        goes_on.set()
        await store._change(lambda _: None)
    assert not went_on.is_set()
    assert (await store.get_session("s", now=T0)).title is None


@pytest.mark.parametrize("name", ["_looking", "_reading", "_changing"])
async def test_a_cancel_that_takes_long_hits_no_step_of_another_caller(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    thread: SqlThread[Db] = getattr(store, name)
    begun, goes_on, cancels, next_begun = (threading.Event() for _ in range(4))
    cancel = Db.cancel

    def cancel_late(db: Db) -> bool:
        cancels.set()
        next_begun.wait(0.3)  # it must not begin before this has ended
        return cancel(db)

    def wait(db: Db) -> None:
        db.execute("SELECT 1")
        begun.set()
        assert goes_on.wait(WAIT_S)

    def follow(db: Db) -> str:
        db.execute("SELECT 1")
        next_begun.set()
        db.execute("SELECT pg_sleep(0.3)")
        return "done"

    monkeypatch.setattr(Db, "cancel", cancel_late)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.call, wait)
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
        await trio.to_thread.run_sync(cancels.wait)
        goes_on.set()
        assert await thread.call(follow) == "done"


async def test_a_connection_on_which_a_cancel_may_arrive_later_is_not_used_again(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, cancels = (threading.Event() for _ in range(3))

    def fail_to_cancel(_: Db) -> bool:
        cancels.set()
        return False

    def wait(db: Db) -> None:
        db.execute("SELECT 1")
        begun.set()
        assert goes_on.wait(WAIT_S)

    def connection(db: Db) -> Db:
        db.execute("SELECT 1")
        return db

    before = await store._look(connection)
    assert await store._look(connection) is before
    monkeypatch.setattr(Db, "cancel", fail_to_cancel)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._look, wait)
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
        await trio.to_thread.run_sync(cancels.wait)
        goes_on.set()
        assert await store._look(connection) is not before


async def test_a_step_that_meets_a_deadlock_is_done_again(store: PostgresStore) -> None:
    attempts = 0

    def write(db: Db) -> str:
        nonlocal attempts
        attempts += 1
        sessions.update(db, "s", SessionPatch(title=f"attempt {attempts}"), store.me, T0)
        if attempts < 3:
            raise psycopg.errors.DeadlockDetected
        return "done"

    assert await store._write(write) == "done"
    assert (await store.get_session("s", now=T0)).title == "attempt 3"


async def test_a_step_that_is_always_in_others_way_fails_in_the_end(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(db: Db) -> None:
        db.execute("SELECT 1")
        raise psycopg.errors.SerializationFailure

    with pytest.raises(StoreError, match="many wanted to change the same at once"):
        await store._write(write)
    await _title(store, "next")


async def test_of_steps_that_share_a_transaction_only_the_faulty_one_fails(store: PostgresStore) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: Db) -> None:
        hangs.set()
        assert goes_on.wait(WAIT_S)

    def fail(db: Db) -> None:
        db.execute("SELECT 1 / 0")

    await store.begin_turn(a_turn(state="queued"), now=T0)
    failed: list[StoreError] = []

    async def call_faulty() -> None:
        try:
            await store._write_own(fail)
        except StoreError as error:
            failed.append(error)

    before = store.writer.commits
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._write, hang)
            await trio.to_thread.run_sync(hangs.wait)
            for call in (
                partial(store.start_turn, "t", now=at(1)),
                call_faulty,
                partial(store.start_turn, "t", now=at(2)),
            ):
                nursery.start_soon(call)
                await trio.testing.wait_all_tasks_blocked()
            goes_on.set()
    assert len(failed) == 1
    assert (await store.get_turn("s", "t", now=T0)).started_at == at(1)
    assert store.writer.commits - before >= 3


async def test_steps_on_own_turns_share_a_commit(store: PostgresStore) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: Db) -> None:
        hangs.set()
        assert goes_on.wait(WAIT_S)

    for n in range(10):
        await store.begin_turn(a_turn(f"t{n}", state="queued"), now=T0)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store._write, hang)
            await trio.to_thread.run_sync(hangs.wait)
            for n in range(10):
                nursery.start_soon(partial(store.start_turn, f"t{n}", now=at(1)))
            await trio.testing.wait_all_tasks_blocked()
            before = store.writer.commits
            goes_on.set()
    assert store.writer.commits - before <= 2, "that of the step before, and one for all"
    assert (await store.get_turn("s", "t9", now=T0)).state == "running"
