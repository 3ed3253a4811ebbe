"""Ephemeral turns in every store: like other turns while they are open, and removed by their end."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from service.errors import (
    OwnedElsewhereError,
    RepeatedError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.models.client import Usage
from service.steps import at_once
from service.storage.memory import MemoryStore
from service.storage.records import EndResult, EndState, SessionPatch, SessionRecord, Siblings, TurnRecord
from service.storage.sqlite import maintenance, open_sqlite_store
from service.storage.sqlite.store import SqliteStore
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, all_sessions, all_turns, at, contents, ended, said
from tests.storage.rows import told as told_by
from tests.storage.test_store_added_turns import an_added_turn
from tests.storage.test_store_keys import a_key
from tests.storage.test_store_owners import a_checkpoint
from tests.storage.test_store_search import found

USAGE = Usage(input_tokens=5, output_tokens=7, reasoning_tokens=1, cached_tokens=2)


def ephemeral(turn_id: str = "e", session_id: str = "s", *, parent: str | None = None, **fields: Any) -> TurnRecord:
    turn = a_turn(turn_id, session_id, parent=parent, texts=["a secret"])
    return msgspec.structs.replace(turn, ephemeral=True, **fields)


def for_one_turn(session_id: str = "s") -> SessionRecord:
    return msgspec.structs.replace(a_session(session_id), ephemeral=True)


async def _with_one_turn(store: Store) -> TurnRecord:
    """A session with a turn that has ended."""
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(a_turn(), now=T0)
    turn = ended(a_turn())
    await store.end_turn(turn, runs=said("Hi"), now=T0)
    return turn


async def test_an_ephemeral_turn_is_there_while_it_is_open_and_is_not_the_head(store: Store) -> None:
    kept = await _with_one_turn(store)
    turn = ephemeral(parent="t")
    before = await store.get_session("s", now=T0)
    begun = await store.begin_turn(turn, now=at(1), head="t", path_bytes_max=None)
    assert begun.path == [kept, turn]
    assert begun.session == msgspec.structs.replace(
        before, open_turns=1, last_accessed_at=at(1), expires_at=at(1 + IDLE_TIMEOUT_S)
    )
    assert await store.get_turn("s", "e", now=at(1)) == turn
    assert await all_turns(store, "s", now=at(1)) == [kept, turn]
    assert (await store.get_session("s", now=at(1))).head == "t"
    assert await found(store, "secret", now=1) == []


async def test_the_end_of_an_ephemeral_turn_removes_it_and_its_session_keeps_what_it_used(store: Store) -> None:
    kept = await _with_one_turn(store)
    before = await store.get_session("s", now=T0)
    await store.begin_turn(ephemeral(parent="t"), now=T0)
    end = ended(ephemeral(parent="t"), text="an answer", reasoning="hm", usage=USAGE)
    assert await store.end_turn(end, runs=said("an answer", item=1), now=at(3)) is EndResult.KEPT
    assert await contents(store, now=at(3)) == {
        "s": (
            msgspec.structs.replace(
                before,
                last_accessed_at=at(3),
                expires_at=at(3 + IDLE_TIMEOUT_S),
                input_tokens=5,
                output_tokens=7,
                reasoning_tokens=1,
                cached_tokens=2,
            ),
            [(kept, ["Hi"])],
        )
    }
    with pytest.raises(TurnNotFoundError):
        await store.get_turn("s", "e", now=at(3))
    assert list(await store.read_path("s", "e", bytes_max=None)) == []
    assert await told_by(store, "s", "e") == []
    assert await found(store, "secret", now=3) == await found(store, "answer", now=3) == []
    with pytest.raises(TurnNotFoundError):
        await store.update_session("s", SessionPatch(head="e"), now=at(3))
    following = a_turn("next", parent="t")
    assert (await store.begin_turn(following, now=at(4), head="t", path_bytes_max=None)).path == [kept, following]


async def test_every_end_removes_an_ephemeral_turn_also_one_that_never_started(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    states: tuple[EndState, ...] = ("failed", "cancelled", "interrupted", "completed")
    for state in states:
        turn = msgspec.structs.replace(ephemeral(state), state="queued", started_at=None)
        await store.begin_turn(turn, now=T0)
        if state == "completed":
            assert await store.start_turn(state, now=T0)
        assert await store.end_turn(ended(turn, state), runs=(), now=T0) is EndResult.KEPT
        assert await all_turns(store, "s", now=T0) == []
    assert await store.get_session("s", now=T0) == a_session()


async def test_a_session_that_was_made_for_an_ephemeral_turn_is_in_no_listing_and_ends_with_it(store: Store) -> None:
    await store.create_session(a_session("other"), now=T0)
    made = msgspec.structs.replace(for_one_turn("owner/s"), metadata={"a": "b"}, title="Title")
    begun = await store.begin_turn(ephemeral(session_id="owner/s"), now=T0, creates=made)
    assert await store.get_session("owner/s", now=T0) == begun.session
    assert (begun.session.open_turns, begun.session.head, begun.session.message_count) == (1, None, 0)
    for status in (None, "running", "idle"):
        for owner in (None, "owner", ""):
            page = await store.list_sessions(limit=9, after=None, status=status, now=T0, owner=owner)
            expected = ["other"] if status != "running" and owner != "owner" else []
            assert [session.id for session in page.data] == expected
            assert await store.count_sessions(status=status, now=T0, owner=owner) == len(expected)
    by_metadata = await store.list_sessions(limit=9, after=None, status=None, now=T0, metadata={"a": "b"})
    assert by_metadata.data == ()
    assert await found(store, "title") == await found(store, "secret") == []

    end = ended(ephemeral(session_id="owner/s"), usage=USAGE)
    assert await store.end_turn(end, runs=said("Hi"), now=T0) is EndResult.KEPT
    with pytest.raises(SessionNotFoundError):
        await store.get_session("owner/s", now=T0)
    assert [session.id for session in await all_sessions(store, now=T0)] == ["other"]
    await store.create_session(a_session("owner/s"), now=T0)  # the id is free
    assert await all_turns(store, "owner/s", now=T0) == []


async def test_no_turn_follows_an_ephemeral_one_whether_it_is_open_or_gone(store: Store) -> None:
    await _with_one_turn(store)
    await store.begin_turn(ephemeral(parent="t"), now=T0)
    before = await contents(store, now=T0)
    for state in ("open", "gone"):
        for branches in (False, True):
            with pytest.raises(TurnNotFoundError):
                await store.begin_turn(a_turn("next", parent="e"), now=T0, branches=branches)
            with pytest.raises(TurnNotFoundError):
                await store.begin_turn(ephemeral("next", parent="e"), now=T0, branches=branches)
        with pytest.raises(TurnNotFoundError):
            await store.add_turns([an_added_turn("next", parent="e")], now=T0)
        assert await contents(store, now=T0) == before
        if state == "open":
            with pytest.raises(TurnInProgressError):
                await store.fork_session("s", at="e", copy_id="copy", now=T0)
            await store.end_turn(ended(ephemeral(parent="t")), runs=said("Hi"), now=T0)
            before = await contents(store, now=T0)
        else:
            with pytest.raises(TurnNotFoundError):
                await store.fork_session("s", at="e", copy_id="copy", now=T0)


async def test_a_session_that_was_made_for_an_ephemeral_turn_takes_no_other_turn_and_no_fork(store: Store) -> None:
    await store.begin_turn(ephemeral(), now=T0, creates=for_one_turn())
    for turn in (a_turn("next"), ephemeral("next")):
        for branches in (False, True):
            with pytest.raises(SessionNotFoundError):
                await store.begin_turn(turn, now=T0, branches=branches)
    with pytest.raises(SessionNotFoundError):
        await store.add_turns([an_added_turn("next")], now=T0)
    with pytest.raises(SessionNotFoundError):
        await store.fork_session("s", at=None, copy_id="copy", now=T0)
    assert await all_turns(store, "s", now=T0) == [ephemeral()]
    assert (await store.get_session("s", now=T0)).open_turns == 1


@pytest.mark.parametrize("is_alone", [False, True])
async def test_an_end_that_is_given_again_was_kept(store: Store, is_alone: bool) -> None:
    if not is_alone:
        await store.create_session(a_session(), now=T0)
    await store.begin_turn(ephemeral(), now=T0, creates=for_one_turn() if is_alone else None)
    end = ended(ephemeral(), usage=USAGE)
    assert await store.end_turn(end, runs=said("Hi"), now=T0) is EndResult.KEPT
    before = await contents(store, now=T0)
    for again in (end, ended(ephemeral(), "failed")):
        assert await store.end_turn(again, runs=said("Hi"), now=at(1)) is EndResult.ALREADY_KEPT
    assert await contents(store, now=T0) == before
    assert await store.start_turn("e", now=T0) is False
    assert await store.checkpoint_turns([a_checkpoint("e", "Hi")]) == ["e"]


@pytest.mark.parametrize("is_alone", [False, True])
async def test_a_key_of_an_ephemeral_turn_says_that_it_is_gone_after_its_end(store: Store, is_alone: bool) -> None:
    if not is_alone:
        await store.create_session(a_session(), now=T0)
    creates = for_one_turn() if is_alone else None
    await store.begin_turn(ephemeral(), now=T0, creates=creates, key=a_key())
    for is_gone in (False, True):
        with pytest.raises(RepeatedError) as repeated:
            await store.begin_turn(ephemeral("again"), now=T0, creates=creates, key=a_key())
        assert (repeated.value.turn_id, repeated.value.is_gone) == ("e", is_gone)
        await store.end_turn(ended(ephemeral()), runs=said("Hi"), now=T0)


async def test_the_siblings_of_an_ephemeral_turn_move_up(store: Store) -> None:
    await _with_one_turn(store)
    turns = [a_turn("a", parent="t"), ephemeral(parent="t"), a_turn("b", parent="t")]
    for place, turn in enumerate(turns, 1):
        assert (await store.begin_turn(turn, now=T0)).siblings == Siblings(place, place)
    await store.end_turn(ended(turns[1]), runs=said("Hi"), now=T0)
    places = await store.find_places("s", ["a", "e", "b"])
    assert places.siblings == {"a": Siblings(1, 2), "b": Siblings(2, 2)}
    assert places.head == "b"
    children = await store.list_turns("s", limit=9, after=None, now=T0, parent="t")
    assert [turn.id for turn in children.data] == ["a", "b"]


Delete = Callable[[Store, str], Awaitable[None]]
each_deletion = pytest.mark.parametrize(
    "delete",
    [
        lambda store, turn: store.delete_turns("s", turn, now=at(1)),
        lambda store, turn: store.delete_turn("s", turn, now=at(1)),
    ],
    ids=["delete_turns", "delete_turn"],
)


async def _leave_with_an_ephemeral_turn(open_shared: OpenStore, *others: TurnRecord, parent: str = "t") -> None:
    """Leave an ephemeral turn open, and then others that have ended."""
    async with open_shared() as there:
        await _with_one_turn(there)
        await there.begin_turn(ephemeral(parent=parent), now=T0)
        for turn in others:
            await there.begin_turn(turn, now=T0)
            await there.end_turn(ended(turn), runs=said("Hi"), now=T0)


@each_deletion
async def test_a_deletion_closes_the_places_that_an_ephemeral_turn_of_a_dead_owner_leaves(
    open_shared: OpenStore, delete: Delete
) -> None:
    await _leave_with_an_ephemeral_turn(open_shared, *(a_turn(name, parent="t") for name in "abc"))
    async with open_shared() as here:
        await delete(here, "b")
        places = await here.find_places("s", ["a", "b", "c", "e"])
        assert places.siblings == {"a": Siblings(1, 2), "c": Siblings(2, 2)}
        assert await here.recover(now=at(2)) == 0


@each_deletion
async def test_a_deletion_finds_no_ephemeral_turn_of_a_dead_owner(open_shared: OpenStore, delete: Delete) -> None:
    await _leave_with_an_ephemeral_turn(open_shared)
    async with open_shared() as here:
        with pytest.raises(TurnNotFoundError):
            await delete(here, "e")
        assert [turn.id for turn in await all_turns(here, "s", now=at(1)) if not turn.ephemeral] == ["t"]


@each_deletion
async def test_an_ephemeral_turn_of_a_dead_owner_keeps_no_turn_from_being_deleted(
    open_shared: OpenStore, delete: Delete
) -> None:
    await _leave_with_an_ephemeral_turn(open_shared)
    async with open_shared() as here:
        await delete(here, "t")
        assert await all_turns(here, "s", now=at(1)) == []


@pytest.mark.parametrize("is_alone", [False, True])
@pytest.mark.parametrize("removed_first", [False, True])
async def test_an_ephemeral_turn_ends_while_its_session_is_being_deleted(
    store: Store, is_alone: bool, removed_first: bool
) -> None:
    if not is_alone:
        await _with_one_turn(store)
    await store.begin_turn(ephemeral(), now=T0, creates=for_one_turn() if is_alone else None)
    await store.mark_deleted("s", now=T0)
    if removed_first:
        await store.remove_deleted("s")
    end = ended(ephemeral(), "cancelled")
    expected = EndResult.ALREADY_KEPT if removed_first else EndResult.KEPT
    assert await store.end_turn(end, runs=said("Hi"), now=T0) is expected
    await store.remove_deleted("s")
    assert await contents(store, now=T0) == {}
    assert not await store.is_marked("s")
    await store.create_session(a_session(), now=T0)
    assert await all_turns(store, "s", now=T0) == []


async def test_the_turn_that_an_ephemeral_turn_follows_is_deleted_after_its_end_only(store: Store) -> None:
    await _with_one_turn(store)
    await store.begin_turn(ephemeral(parent="t"), now=T0)
    with pytest.raises(TurnInProgressError):
        await store.delete_turns("s", "t", now=T0)
    with pytest.raises(TurnInProgressError):
        await store.delete_item("s", "t-out", now=T0)
    await store.end_turn(ended(ephemeral(parent="t")), runs=said("Hi"), now=T0)
    await store.delete_item("s", "t-out", now=T0)
    await store.delete_turns("s", "t", now=T0)
    assert await store.get_session("s", now=T0) == a_session()


async def test_a_walk_along_a_path_goes_on_while_ephemeral_turns_beside_it_end(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    parent = None
    for number in range(50):
        turn = an_added_turn(f"t{number}", parent=parent)
        await store.add_turns([turn], now=T0)
        parent = turn.id
    paths: list[int] = []

    async def read() -> None:
        for _ in range(10):
            paths.append(len(await store.read_path("s", "t49", bytes_max=None)))
            await store.fork_session("s", at="t49", copy_id=f"copy{len(paths)}", now=T0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for number in range(20):
            turn = ephemeral(f"e{number}", parent=f"t{number}")
            await store.begin_turn(turn, now=T0)
            await store.end_turn(ended(turn), runs=said("Hi"), now=T0)
    assert paths == [50] * 10
    assert len(await all_turns(store, "s", now=T0)) == 50


# Stores that outlive their owner


@pytest.mark.parametrize("is_alone", [False, True])
async def test_a_crash_removes_an_ephemeral_turn_and_what_it_used_counts(
    open_shared: OpenStore, is_alone: bool
) -> None:
    async with open_shared() as store:
        if not is_alone:
            await _with_one_turn(store)
        await store.begin_turn(ephemeral(), now=T0, creates=for_one_turn() if is_alone else None)
        checkpoint = msgspec.structs.replace(a_checkpoint("e", "an ", "answer"), usage=USAGE)
        assert await store.checkpoint_turns([checkpoint]) == []
    async with open_shared() as store:
        assert await store.recover(now=at(1)) == 1
        assert await store.recover(now=at(1)) == 0
        if is_alone:
            assert await contents(store, now=at(1)) == {}
            await store.create_session(a_session(), now=at(1))
        else:
            assert [turn.id for turn in await all_turns(store, "s", now=at(1))] == ["t"]
            session = await store.get_session("s", now=at(1))
            assert (session.head, session.open_turns, session.message_count) == ("t", 0, 2)
            assert (session.input_tokens, session.output_tokens) == (5, 7)
        assert await told_by(store, "s", "e") == []


async def test_an_ephemeral_turn_has_one_owner_as_others_have(open_shared: OpenStore) -> None:
    async with open_shared() as beside:
        async with open_shared() as store:
            await _with_one_turn(store)
            await store.begin_turn(ephemeral(parent="t"), now=T0)
            with pytest.raises(OwnedElsewhereError):
                await beside.begin_turn(a_turn("next", parent="t"), now=T0)
            assert await beside.end_turn(ended(ephemeral(parent="t")), runs=said("Hi"), now=T0) is EndResult.LOST
            assert (await beside.get_turn("s", "e", now=T0)).is_open
        begun = await beside.begin_turn(a_turn("next", parent="t"), now=at(1))
        assert begun.session.open_turns == 1, "the turn of the owner that is gone was removed in the same step"
        assert [turn.id for turn in await all_turns(beside, "s", now=at(1))] == ["t", "next"]
        assert await beside.recover(now=at(1)) == 0


# The file of SQLite


@pytest.mark.parametrize("is_alone", [False, True])
async def test_nothing_of_an_ephemeral_turn_is_left_in_the_file(tmp_path: Path, is_alone: bool) -> None:
    path = tmp_path / "lastcall.db"
    long = "words that are in pages " * 10_000
    async with open_sqlite_store(path) as store:
        if not is_alone:
            await _with_one_turn(store)
        before = await _rows_of(store)
        face = {"metadata": msgspec.Raw(b'{"a":"another secret"}')}
        turn = ephemeral(face=face)
        await store.begin_turn(turn, now=T0, creates=for_one_turn() if is_alone else None, key=a_key())
        await store.checkpoint_turns([a_checkpoint("e", long)])
        assert (await _rows_of(store))["event_pages"] > before["event_pages"]
        await store.end_turn(ended(turn, text=long * 2), runs=said(long, long), now=T0, after=1)
        for table in ("turns", "sessions"):
            assert "secret" not in await _dump(store, table)
        await _until_reclaimed(store)
        after = await _rows_of(store)
        assert after.pop("idempotency_keys") == 1
        assert after == {name: count for name, count in before.items() if name != "idempotency_keys"}
    assert maintenance.check(path) == []


async def test_an_ephemeral_session_is_not_exported(tmp_path: Path) -> None:
    path = tmp_path / "lastcall.db"
    async with open_sqlite_store(path) as store:
        await store.begin_turn(ephemeral(), now=T0, creates=for_one_turn())
        with pytest.raises(SessionNotFoundError):
            maintenance.export_session(path, "s")
        assert maintenance.check(path) == []


async def _until_reclaimed(store: SqliteStore) -> None:
    with trio.fail_after(60):
        while store.writer.removed:  # noqa: ASYNC110  the writer's thread sets it
            await trio.sleep(0.001)


async def _rows_of(store: SqliteStore) -> dict[str, int]:
    tables = ("sessions", "session_settings", "turns", "siblings", "event_pages", "outputs", "documents")
    return {table: len(await _rows(store, table)) for table in (*tables, "idempotency_keys")}


async def _dump(store: SqliteStore, table: str) -> str:
    return repr(await _rows(store, table))


async def _rows(store: SqliteStore, table: str) -> Sequence[object]:
    return await store._reading.call(lambda db: db.execute(f"SELECT * FROM {table}").fetchall())


async def test_a_deletion_of_many_turns_begins_anew_if_an_ephemeral_turn_ends_meanwhile() -> None:
    """It looks at all turns of the session, step by step, and would keep the one that has just gone."""
    store = MemoryStore()
    await store.create_session(a_session(), now=T0)
    await store.begin_turn(ephemeral(), now=T0)
    chain = [an_added_turn(f"t{n}", parent=f"t{n - 1}" if n else None) for n in range(150)]
    await store.add_turns(chain, now=T0)
    deletion = store._delete_turns("s", "t0", T0)
    for _ in range(2 * len(chain) + 1):
        next(deletion)
    await store.end_turn(ended(ephemeral()), runs=said("Hi"), now=T0)
    assert at_once(deletion) is False
    await store.delete_turns("s", "t0", now=T0)
    assert await contents(store, now=T0) == {"s": (a_session(), [])}
