"""Removals of sessions: each is gone for every reader at once, and its rows are removed in pieces."""

import msgspec
import psycopg
import pytest
import trio

from service.storage.postgres import PostgresStore, removals
from service.storage.postgres import store as postgres_store
from service.storage.postgres.connections import Db
from service.storage.records import EndResult, SessionPatch
from tests.postgres_server import PostgresServer
from tests.storage.conftest import OpenStore
from tests.storage.postgres.conftest import Run
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, all_turns, at, ended, said
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_owners import a_checkpoint

LATE = at(IDLE_TIMEOUT_S)
TURNS = "SELECT count(*) FROM {s}.turns"
ALL = (
    "SELECT (SELECT count(*) FROM {s}.sessions), (SELECT count(*) FROM {s}.turns), "
    "(SELECT count(*) FROM {s}.documents), (SELECT count(*) FROM {s}.event_pages), "
    "(SELECT count(*) FROM {s}.session_metadata)"
)
NOTHING = [(0, 0, 0, 0, 0)]


@pytest.fixture
def _in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece of three turns a call."""
    monkeypatch.setattr(removals, "TURNS_MAX", 3)
    monkeypatch.setattr(postgres_store, "REMOVING_S", 0)


async def _fill(store: PostgresStore, name: str, turns: int) -> None:
    await store.create_session(a_session(name), now=T0)
    added = [an_added_turn(f"{name}-{n}", parent=f"{name}-{n - 1}" if n else None) for n in range(turns)]
    await store.add_turns([msgspec.structs.replace(turn, session_id=name) for turn in added], now=T0)
    await store.update_session(name, SessionPatch(title="Title", metadata={"a": "b"}), now=T0)


@pytest.mark.usefixtures("_in_pieces")
async def test_expired_sessions_are_gone_at_once_and_their_rows_in_pieces(store: PostgresStore, select: Run) -> None:
    for n in range(5):
        await _fill(store, f"s{n}", 4)
    assert await store.delete_expired(now=LATE, limit=10) == 5
    for n in range(5):
        new = msgspec.structs.replace(a_session(f"s{n}"), expires_at=at(2 * IDLE_TIMEOUT_S))
        await store.create_session(new, now=LATE)
        assert await all_turns(store, f"s{n}", now=LATE) == []
        assert await store.find_session_of(f"s{n}-3") is None
        await store.mark_deleted(f"s{n}", now=LATE)
    left = [select(TURNS)[0][0]]
    while left[-1]:
        assert await store.delete_expired(now=LATE, limit=10) == 0
        left.append(select(TURNS)[0][0])
    assert left == [17, 14, 11, 8, 5, 2, 0]
    for n in range(5):
        await store.remove_deleted(f"s{n}")
    assert select(ALL) == NOTHING


@pytest.mark.usefixtures("_in_pieces")
async def test_a_caller_that_leaves_a_removal_loses_one_piece_at_most(
    store: PostgresStore, select: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "REMOVING_S", 60)
    await _fill(store, "s", 10)
    await store.mark_deleted("s", now=T0)
    pieces = 0
    remove_some = removals.remove_some

    with trio.fail_after(60), trio.CancelScope() as scope:

        def remove(db: Db) -> bool:
            nonlocal pieces
            pieces += 1
            if pieces == 3:
                trio.from_thread.run_sync(scope.cancel, trio_token=token)
            return remove_some(db)

        token = trio.lowlevel.current_trio_token()
        monkeypatch.setattr(removals, "remove_some", remove)
        await store.remove_deleted("s")
    monkeypatch.undo()
    await store._changing.call(lambda _: None)
    assert scope.cancelled_caught
    assert select(TURNS) in ([(4,)], [(1,)])
    await store.create_session(a_session(), now=T0)
    await store.mark_deleted("s", now=T0)
    await store.remove_deleted("s")
    assert await store.recover(now=T0) == 0
    assert select(ALL) == NOTHING


@pytest.mark.usefixtures("_in_pieces")
async def test_a_session_over_an_expired_one_removes_no_turn_of_it(store: PostgresStore, select: Run) -> None:
    await _fill(store, "s", 50)
    begun = await store.begin_turn(a_turn("new"), now=LATE, creates=a_session(), path_bytes_max=None)
    assert [turn.id for turn in begun.path or ()] == ["new"]
    assert select(TURNS) == [(51,)]
    assert [turn.id for turn in await all_turns(store, "s", now=LATE)] == ["new"]
    calls = 0
    while select(TURNS) != [(1,)]:
        assert await store.recover(now=LATE) == 0
        calls += 1
    assert calls == 17
    assert select("SELECT id FROM {s}.sessions") == [("s",)]


async def test_turns_that_are_open_when_their_session_is_removed_are_nowhere_open(
    store: PostgresStore, open_another: OpenStore, select: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_store, "REMOVING_S", 0)
    monkeypatch.setattr(removals, "TURNS_MAX", 1)
    await store.create_session(a_session(), now=T0)
    for name in ("a", "b", "c"):
        await store.begin_turn(a_turn(name, state="queued" if name == "c" else "running"), now=T0)
    await store.mark_deleted("s", now=T0)
    await store.remove_deleted("s")
    assert select(TURNS) == [(2,)]
    assert set(await store.checkpoint_turns([a_checkpoint("b", "Hi"), a_checkpoint("c", "Hi")])) == {"b", "c"}
    assert not await store.start_turn("c", now=T0)
    assert await store.end_turn(ended(a_turn("b")), runs=said("Hi"), now=T0) is EndResult.LOST
    await store.aclose()
    async with open_another() as another:
        assert await another.recover(now=at(1)) == 0
        assert await another.recover(now=at(1)) == 0
        assert select(TURNS) == [(0,)]


async def test_a_recovery_passes_over_what_others_hold_and_comes_back_to_it(
    postgres: PostgresServer, schema: str, open_another: OpenStore, select: Run
) -> None:
    async with open_another() as first:
        await first.create_session(a_session("held"), now=T0)
        await first.mark_deleted("held", now=T0)
        async with open_another() as second:
            await second.begin_turn(a_turn("t"), now=T0, creates=a_session())
            await second.begin_turn(a_turn("t2", "s2"), now=T0, creates=a_session("s2"))
    async with open_another() as here:
        assert isinstance(here, PostgresStore)
        with psycopg.connect(postgres.url) as other, trio.fail_after(60):
            assert other.execute(f"SELECT key FROM {schema}.sessions WHERE id = 'held' FOR UPDATE".encode()).rowcount
            assert await here.recover(now=at(1)) == 2
            assert (await here.get_turn("s", "t", now=at(1))).state == "interrupted"
            assert select("SELECT count(*) FROM {s}.owners WHERE dead") == [(1,)], "its deletion is not finished"
        assert await here.recover(now=at(2)) == 0
        assert select("SELECT fence FROM {s}.owners") == [(here.fence,)]
        await here.create_session(a_session("held"), now=at(2))
