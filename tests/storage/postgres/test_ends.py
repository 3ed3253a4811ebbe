"""Ends of turns in PostgreSQL: those that come at once share a transaction and a statement."""

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from service.models.client import Usage
from service.storage.pieces import Run as Events
from service.storage.postgres import PostgresStore
from service.storage.postgres.connections import Cursor, Db
from service.storage.records import EndResult, TurnRecord
from tests.storage.conftest import OpenStore
from tests.storage.postgres.conftest import Run
from tests.storage.rows import T0, a_session, a_turn, at, ended, said, told
from tests.storage.test_store_ephemeral import ephemeral, for_one_turn

LONG = "word " * 40_000
"""Too long for the row of a turn."""


@asynccontextmanager
async def writer_held_up(store: PostgresStore) -> AsyncIterator[None]:
    """What is called within the context waits in the writer's line, and is taken together after it."""
    begun, goes_on = threading.Event(), threading.Event()

    def hold(_: Db) -> None:
        begun.set()
        goes_on.wait(60)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store._write, hold)
        while not begun.is_set():  # noqa: ASYNC110  a thread's event
            await trio.sleep(0.001)
        try:
            yield
        finally:
            goes_on.set()


async def end_at_once(
    store: PostgresStore, ends: Sequence[tuple[TurnRecord, Sequence[Events]]]
) -> dict[int, EndResult]:
    """Tell the store ends at once. Returns the result of each, by its place."""
    results: dict[int, EndResult] = {}

    async def end(place: int, turn: TurnRecord, runs: Sequence[Events]) -> None:
        results[place] = await store.end_turn(turn, runs=runs, now=at(place))

    async with trio.open_nursery() as nursery, writer_held_up(store):
        for place, (turn, runs) in enumerate(ends):
            nursery.start_soon(end, place, turn, runs)
            await wait_all_tasks_blocked()
    return results


async def test_the_ends_of_many_turns_take_a_few_statements(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [a_turn(f"t{n}", f"s{n}") for n in range(100)]
    for turn in turns:
        await store.create_session(a_session(turn.session_id), now=T0)
        await store.begin_turn(turn, now=T0)
    done: list[str] = []
    execute = Db.execute

    def note(db: Db, statement: str, parameters: Any = None) -> Cursor:
        done.append(statement)
        return execute(db, statement, parameters)

    monkeypatch.setattr(Db, "execute", note)
    commits, steps = store.writer.commits, store.writer.steps
    results = await end_at_once(store, [(ended(turn), said("Hi")) for turn in turns])
    assert set(results.values()) == {EndResult.KEPT}
    assert store.writer.steps - steps == 101
    assert store.writer.commits - commits <= 4, "64 steps at the most share a transaction"
    assert len([it for it in done if "'queued', 'running'" in it or "documents" in it]) <= 4
    for turn in turns[::20]:
        assert (await store.get_turn(turn.session_id, turn.id, now=at(1))).text == "Hi"


async def test_ends_of_all_kinds_at_once_each_have_their_own_result(store: PostgresStore, select: Run) -> None:
    await store.create_session(a_session(), now=T0)
    first = a_turn("first")
    queued = msgspec.structs.replace(a_turn("queued", parent="first"), state="queued", started_at=None)
    await store.begin_turn(first, now=T0)
    await store.begin_turn(queued, now=T0)
    await store.create_session(a_session("long"), now=T0)
    long = a_turn("long", "long")
    await store.begin_turn(long, now=T0)
    await store.begin_turn(ephemeral("alone", "once"), now=T0, creates=for_one_turn("once"))
    never = a_turn("never", "long")
    usage = Usage(input_tokens=2, output_tokens=3)
    end_of_first = (ended(first, usage=usage, now=at(1)), said("Hi"))
    results = await end_at_once(
        store,
        [
            end_of_first,
            (ended(long, text=LONG), said(LONG)),
            (ended(never), said("Hi")),
            (ended(ephemeral("alone", "once")), said("Hi")),
            end_of_first,
            (ended(queued, "interrupted", text=""), ()),
        ],
    )
    kept, again, lost = EndResult.KEPT, EndResult.ALREADY_KEPT, EndResult.LOST
    assert [results[place] for place in range(6)] == [kept, kept, lost, kept, again, kept]
    session = await store.get_session("s", now=at(9))
    assert (session.open_turns, session.input_tokens, session.output_tokens) == (0, 2, 3)
    assert (session.message_count, session.last_accessed_at) == (3, at(5))
    assert await store.find_owner("s") is None
    assert (await store.get_turn("s", "first", now=at(9))).usage == usage
    assert (await store.get_turn("s", "queued", now=at(9))).state == "interrupted"
    assert await told(store, "s", "first") == ["Hi"]
    assert "".join(await told(store, "long", "long")) == (await store.get_turn("long", "long", now=at(9))).text == LONG
    assert select("SELECT id FROM {s}.sessions ORDER BY id") == [("long",), ("s",)]
    for words, ids in (("Hi", ["s"]), ("word", ["long"])):
        found = await store.search_sessions(words, limit=9, after=None, status=None, now=at(9))
        assert [it.session.id for it in found.data] == ids


async def test_an_end_is_kept_with_others_only_by_the_owner_of_the_turn(
    store: PostgresStore, open_another: OpenStore
) -> None:
    async with open_another() as other:
        for name in ("mine", "theirs"):
            await store.create_session(a_session(name), now=T0)
        mine, theirs = a_turn("mine", "mine"), a_turn("theirs", "theirs")
        await store.begin_turn(mine, now=T0)
        await other.begin_turn(theirs, now=T0)
        results = await end_at_once(store, [(ended(it), said("Hi")) for it in (mine, theirs)])
        assert results == {0: EndResult.KEPT, 1: EndResult.LOST}
        assert (await store.get_session("theirs", now=T0)).open_turns == 1
        assert await other.end_turn(ended(theirs), runs=said("Hi"), now=T0) is EndResult.KEPT
