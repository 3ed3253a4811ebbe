"""Turns that are complete at once: what every store keeps of them, and when it refuses them."""

import msgspec
import pytest
import trio

from service.errors import (
    HeadMovedError,
    OwnedElsewhereError,
    RepeatedError,
    SessionExistsError,
    SessionNotFoundError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.storage.pieces import STARTED, Run, count
from service.storage.records import EndResult, IdempotencyKey, Item, LeftOut, SessionRecord, Siblings, TurnRecord
from service.storage.rules import PIECE_LENGTH_MAX, events_at_once, with_added
from service.storage.sqlite import tree_changes
from service.storage.store import Store
from tests.storage.conftest import OpenStore
from tests.storage.rows import IDLE_TIMEOUT_S, T0, a_session, a_turn, all_turns, at, contents, ended, said, told


def an_added_turn(name: str, *, parent: str | None = None, asked: str = "Hi", replied: str = "Hello") -> TurnRecord:
    output = (Item(id=f"{name}-out", role="assistant", text=replied),) if replied else ()
    return TurnRecord(
        id=name,
        session_id="s",
        parent=parent,
        state="completed",
        model="a-model",
        created_at=T0,
        ended_at=T0,
        input=(Item(id=f"{name}-in", role="user", text=asked),) if asked else (),
        output=output,
        finish_reason="stop",
        last_seq=count(events_at_once(output)) + 1,
    )


async def test_added_turns_are_a_chain_from_the_head_and_count_as_one_use(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    added = [an_added_turn("a"), an_added_turn("b", parent="a", replied=""), an_added_turn("c", parent="b", asked="")]
    session = await store.add_turns(added, now=at(5), head=None)
    assert session == msgspec.structs.replace(
        a_session(), head="c", message_count=4, last_accessed_at=at(5), expires_at=at(5 + IDLE_TIMEOUT_S)
    )
    assert await store.get_session("s", now=T0) == session
    assert await all_turns(store, "s", now=T0) == added
    assert list(await store.read_path("s", "c", bytes_max=None)) == added
    assert await store.measure_path("s", "c") == LeftOut(4, 14)
    assert await store.get_turn("s", "b", now=T0) == added[1]
    begun = await store.begin_turn(a_turn("next", parent="c"), now=at(6), head="c", path_bytes_max=None)
    assert [turn.id for turn in begun.path or ()] == ["a", "b", "c", "next"]


async def test_the_events_of_an_added_turn_are_its_start_and_then_its_texts(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    long = "x" * (2 * PIECE_LENGTH_MAX + 1)
    call = Item(id="call", type="function_call", role="assistant", text='{"a":1}', call_id="1", name="f")
    turn = an_added_turn("a", replied=long)
    output = (*turn.output, call, msgspec.structs.replace(call, id="other", text=""))
    turn = msgspec.structs.replace(turn, output=output, last_seq=count(events_at_once(output)) + 1)
    await store.add_turns([turn], now=T0)
    assert await told(store, "s", "a", length_max=5000) == [long[:4096], long[:4096], "x", '{"a":1}']
    page = await store.read_events("s", "a")
    assert page.runs[0] == Run(STARTED)
    assert (page.kept, page.kept + 1, page.ended) == (7, turn.last_seq, True)


async def test_an_added_turn_whose_texts_fill_many_pages_is_read_whole(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    turn = an_added_turn("a", replied="é" * 300_000)
    await store.add_turns([turn], now=T0)
    assert await store.get_turn("s", "a", now=T0) == turn
    assert "".join(await told(store, "s", "a")) == "é" * 300_000
    copy = await store.fork_session("s", at=None, copy_id="copy", now=T0)
    assert copy.message_count == 2
    assert (await all_turns(store, "copy", now=T0))[0].text == "é" * 300_000


async def test_what_cannot_be_added_changes_nothing(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.create_session(a_session("other"), now=T0)
    await store.begin_turn(a_turn("theirs", "other"), now=T0)
    await store.add_turns([an_added_turn("a")], now=T0)
    await store.begin_turn(a_turn("open", parent="a"), now=T0)
    before = await contents(store, now=T0)
    for error, parent in ((TurnNotFoundError, "none"), (TurnNotFoundError, "theirs"), (TurnInProgressError, "open")):
        with pytest.raises(error):
            await store.add_turns([an_added_turn("b", parent=parent)], now=at(1))
    with pytest.raises(HeadMovedError):
        await store.add_turns([an_added_turn("b", parent="a")], now=at(1), head="a")
    with pytest.raises(SessionNotFoundError):
        await store.add_turns([msgspec.structs.replace(an_added_turn("b"), session_id="none")], now=at(1))
    assert await contents(store, now=T0) == before


async def test_turns_are_added_beside_an_open_turn_with_an_ended_parent(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.add_turns([an_added_turn("a")], now=T0)
    open_turn = a_turn("open", parent="a")
    await store.begin_turn(open_turn, now=T0)
    session = await store.add_turns([an_added_turn("b", parent="a")], now=T0)
    assert (session.head, session.open_turns, session.message_count) == ("b", 1, 5)
    assert await store.end_turn(ended(open_turn), runs=said("Hi"), now=T0) is EndResult.KEPT
    session = await store.get_session("s", now=T0)
    assert (session.head, session.open_turns, session.message_count) == ("b", 0, 6)


async def test_only_the_owner_of_the_open_turns_adds_turns(open_shared: OpenStore) -> None:
    async with open_shared() as store:
        await store.create_session(a_session(), now=T0)
        await store.add_turns([an_added_turn("a")], now=T0)
        async with open_shared() as owner:
            await owner.begin_turn(a_turn("open", parent="a"), now=T0)
            with pytest.raises(OwnedElsewhereError):
                await store.add_turns([an_added_turn("b", parent="a")], now=T0)
        await store.add_turns([an_added_turn("b", parent="open")], now=at(1))
        assert [turn.state for turn in await all_turns(store, "s", now=at(1))] == [
            "completed",
            "interrupted",
            "completed",
        ]


async def test_very_many_added_turns_are_shown_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.steps.STEP_S", 0)
    monkeypatch.setattr(tree_changes, "STEP_S", 0.0001)
    await store.create_session(a_session(), now=T0)
    await store.add_turns([an_added_turn("a")], now=T0)
    added = [an_added_turn(f"t{n}", parent=f"t{n - 1}" if n else "a", asked=f"words {n}") for n in range(500)]
    seen: list[tuple[int, str | None, int]] = []
    ended = trio.Event()

    async def look() -> None:
        while not ended.is_set():
            session = await store.get_session("s", now=T0)
            page = await store.search_sessions("words", limit=1, after=None, status=None, metadata={}, now=T0)
            tree = await store.list_tree("s", limit=1000, after=None, now=T0)
            seen.append((session.message_count, page.data[0].turn_id if page.data else None, len(tree.data)))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            while not seen:
                await trio.lowlevel.checkpoint()
            await store.add_turns(added, now=T0)
            during = len(seen)
            while len(seen) < during + 2:
                await trio.lowlevel.checkpoint()
            ended.set()
    # One transaction of PostgreSQL may be over too soon (postgres/test_long_changes.py).
    assert during > 1 or store.name.startswith("postgresql:"), "others read between the steps"
    counts = [count for count, _, _ in seen]
    assert counts == sorted(counts, key=(2, 1002).index)
    in_trees = [turns for _, _, turns in seen]
    assert in_trees == sorted(in_trees, key=(1, 501).index)
    # A search that began before it was over knows the newest turn of that moment.
    found = [turn_id is not None for _, turn_id, _ in seen]
    assert found == sorted(found)
    assert (seen[0], seen[-1]) == ((2, None, 1), (1002, "t499", 501))
    assert await all_turns(store, "s", now=T0) == [an_added_turn("a"), *added]
    await store.delete_turns("s", "t0", now=T0)
    assert await all_turns(store, "s", now=T0) == [an_added_turn("a")]


# Sessions that begin with turns


def a_beginning(*turns: TurnRecord, session_id: str = "s") -> tuple[SessionRecord, list[TurnRecord]]:
    added = [msgspec.structs.replace(turn, session_id=session_id) for turn in turns]
    return with_added(a_session(session_id), added, T0), added


async def test_a_session_is_created_with_turns_as_if_they_were_added(store: Store, open_store: OpenStore) -> None:
    long = "é" * 200_000
    turns = [an_added_turn("a", asked="first words"), an_added_turn("b", parent="a", replied=long)]
    session, added = a_beginning(*turns)
    await store.create_session(session, now=T0, added=added)
    async with open_store() as other:
        await other.create_session(a_session(), now=T0)
        assert await other.add_turns(turns, now=T0) == session
        assert await contents(store, now=T0) == await contents(other, now=T0)
    page = await store.search_sessions("first words", limit=5, after=None, status=None, metadata={}, now=T0)
    assert [match.turn_id for match in page.data] == ["a"]
    begun = await store.begin_turn(a_turn("next", parent="b"), now=at(6), head="b", path_bytes_max=None)
    assert (begun.siblings, (await store.get_session("s", now=T0)).message_count) == (Siblings(), 5)


async def test_the_key_of_a_session_with_turns_is_that_of_the_session(store: Store) -> None:
    key = IdempotencyKey(caller="", key="k", fingerprint=b"f")
    session, added = a_beginning(an_added_turn("a"))
    await store.create_session(session, now=T0, key=key, added=added)
    again, other = a_beginning(an_added_turn("b"), session_id="again")
    with pytest.raises(RepeatedError) as repeated:
        await store.create_session(again, now=T0, key=key, added=other)
    assert (repeated.value.session_id, repeated.value.turn_id, repeated.value.is_gone) == ("s", None, False)
    assert list(await contents(store, now=T0)) == ["s"]
    await store.delete_turns("s", "a", now=T0)
    with pytest.raises(RepeatedError) as repeated:
        await store.check_key(key, now=T0)
    assert not repeated.value.is_gone


async def test_a_session_with_turns_takes_the_id_of_an_expired_one_and_of_no_other(store: Store) -> None:
    await store.create_session(a_session(), now=T0)
    await store.add_turns([an_added_turn("old")], now=T0)
    session, added = a_beginning(an_added_turn("a"))
    before = await contents(store, now=T0)
    with pytest.raises(SessionExistsError):
        await store.create_session(session, now=T0, added=added)
    assert await contents(store, now=T0) == before
    late = at(IDLE_TIMEOUT_S + 1)
    renewed = msgspec.structs.replace(session, created_at=late, expires_at=at(2 * IDLE_TIMEOUT_S))
    await store.create_session(renewed, now=late, added=added)
    assert await all_turns(store, "s", now=late) == added
    assert await store.find_session_of("old") is None


async def test_of_sessions_with_one_id_that_are_created_at_once_one_is_whole(store: Store) -> None:
    outcomes: list[str] = []

    async def create(name: str) -> None:
        session, added = a_beginning(
            *(an_added_turn(f"{name}{n}", parent=f"{name}{n - 1}" if n else None) for n in range(20))
        )
        try:
            await store.create_session(session, now=T0, added=added)
        except SessionExistsError:
            outcomes.append("refused")
        else:
            outcomes.append(name)

    async with trio.open_nursery() as nursery:
        for name in ("x", "y", "z"):
            nursery.start_soon(create, name)
    (name,) = (outcome for outcome in outcomes if outcome != "refused")
    assert outcomes.count("refused") == 2
    assert [turn.id for turn in await all_turns(store, "s", now=T0)] == [f"{name}{n}" for n in range(20)]
    assert (await store.get_session("s", now=T0)).message_count == 40
