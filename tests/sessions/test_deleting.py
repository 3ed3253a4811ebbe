"""Deletions of turns and messages beside running turns, replays and listings."""

from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import (
    EventsDeletedError,
    EventsLostError,
    ItemNotFoundError,
    SessionNotFoundError,
    StoreError,
    TurnInProgressError,
    TurnNotFoundError,
)
from service.models.client import Message
from service.sessions.commands import NewItems, NewSession
from service.sessions.events.event_log import Events
from service.storage.memory import MemoryStore
from service.storage.records import SessionPatch, TurnRecord
from service.storage.rules import PATCHED_FIELDS
from service.storage.store import PAGE_LENGTH_MAX
from tests.sessions.active.test_acceptance import Hangs
from tests.sessions.puppet import Stage, open_stage, read_all
from tests.sessions.turns.test_calls_in_prompts import asks, brings, calls, says
from tests.sessions.turns.test_turns import start
from tests.storage.test_store_cancellation import CancelAtWait

NOW = datetime(2030, 1, 1, tzinfo=UTC)


async def read_on(log: Events, seq: int) -> None:
    """Read the rest of a replay, as a stream does."""
    while seq < log.last_seq:
        await log.load_after(seq)
        read = log.read_after(seq)
        assert read, "a gap"
        seq = read[-1].seq


async def a_conversation(stage: Stage) -> tuple[str, list[TurnRecord]]:
    """A session with three exchanges."""
    session_id = (await stage.sessions.create_session(NewSession())).id
    items = tuple(item for text in "abc" for item in (asks(text), says(text.upper())))
    return session_id, list(await stage.sessions.add_items(session_id, NewItems(items=items)))


async def texts_of(stage: Stage, session_id: str) -> str:
    messages = await stage.sessions.list_messages(session_id, limit=100)
    return "".join(message.item.text for message in messages.data)


async def prompt_after(stage: Stage, session_id: str) -> list[str]:
    """The prompt of the next turn, in short."""
    turn = await start(stage.sessions, session_id, "now")
    reply = await stage.puppet.next_reply()
    reply.finish()
    await turn.wait_ended()
    assert all(isinstance(item, Message) for item in reply.request.prompt)
    return [item.text for item in reply.request.prompt]


async def test_a_deleted_turn_is_in_no_list_and_in_no_prompt(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id, turns = await a_conversation(stage)
        await stage.sessions.delete_turn(session_id, turns[1].id)
        assert await texts_of(stage, session_id) == "aA"
        for gone in turns[1:]:
            with pytest.raises(TurnNotFoundError):
                await stage.sessions.open_events(session_id, gone.id)
            with pytest.raises(TurnNotFoundError):
                await stage.sessions.delete_turn(session_id, gone.id)
        assert await prompt_after(stage, session_id) == ["a", "A", "now"]


async def test_a_deleted_message_is_in_no_list_and_in_no_prompt(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id, turns = await a_conversation(stage)
        await stage.sessions.delete_item(session_id, "o_A")
        await stage.sessions.delete_item(session_id, "i_c")
        assert await texts_of(stage, session_id) == "abBC"
        assert (await stage.sessions.get_session(session_id)).message_count == 4
        assert await prompt_after(stage, session_id) == ["a\n\nb", "B\n\nC", "now"]
        with pytest.raises(ItemNotFoundError):
            await stage.sessions.delete_item(session_id, "o_A")
        assert (await stage.sessions.get_turn(session_id, turns[0].id)).events_deleted


async def test_a_result_that_is_deleted_is_told_as_not_answered(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        items = (asks("a"), calls("1"), brings("1"), says("A"))
        await stage.sessions.add_items(session_id, NewItems(items=items))
        await stage.sessions.delete_item(session_id, "fco_1_out")
        turn = await start(stage.sessions, session_id, "now")
        reply = await stage.puppet.next_reply()
        assert [item.text for item in reply.request.prompt] == [
            *("a", "A", '{"of":"1"}', "[This call was not answered.]", "now"),
        ]
        reply.finish()
        await turn.wait_ended()


async def test_nothing_is_deleted_under_a_running_turn_but_beside_it(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id, turns = await a_conversation(stage)
        running = await start(stage.sessions, session_id)
        reply = await stage.puppet.next_reply()
        reply.say("so far")
        await wait_all_tasks_blocked()
        live = running.record()
        for turn_id in (turns[0].id, running.id):
            with pytest.raises(TurnInProgressError):
                await stage.sessions.delete_turn(session_id, turn_id)
        for item_id in ("i_a", live.input[0].id, live.output[0].id):
            with pytest.raises(TurnInProgressError):
                await stage.sessions.delete_item(session_id, item_id)
        (beside,) = await stage.sessions.add_items(session_id, NewItems(items=(asks("x"),), parent=turns[0].id))
        await stage.sessions.delete_item(session_id, "i_x")
        await stage.sessions.delete_turn(session_id, beside.id)
        assert (await stage.sessions.get_session(session_id)).head == turns[0].id
        reply.finish()
        await running.wait_ended()
        await stage.sessions.delete_turn(session_id, running.id)
        assert (await stage.sessions.get_session(session_id)).head == turns[0].id


async def test_a_replay_after_a_deletion_says_that_the_events_were_deleted(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id, turns = await a_conversation(stage)
        before, _ = await stage.sessions.open_events(session_id, turns[2].id)
        await stage.sessions.delete_item(session_id, "o_C")
        for after in (0, 1, 2, 3, 10**6):
            with pytest.raises(EventsDeletedError):
                await stage.sessions.open_events(session_id, turns[2].id, after=after)
        with pytest.raises(EventsDeletedError):
            await stage.sessions.resume_newest(session_id, said=turns[2].input, after=1)
        assert len(await read_all(before)) == 3, "this replay had all of its events already"
        await stage.sessions.delete_item(session_id, "i_b")
        log, _ = await stage.sessions.open_events(session_id, turns[1].id)
        assert len(await read_all(log)) == 3, "the events tell nothing of the input"


@pytest.mark.parametrize("what", ["item", "turn", "session"])
async def test_a_replay_that_goes_on_after_a_deletion_ends_in_an_error(autojump_clock: MockClock, what: str) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        long = msgspec.structs.replace(says("x"), text="x" * 3 * PAGE_LENGTH_MAX)
        (turn,) = await stage.sessions.add_items(session_id, NewItems(items=(asks("a"), long)))
        log, _ = await stage.sessions.open_events(session_id, turn.id)
        read = log.read_after(0)
        assert 0 < len(read) < turn.last_seq
        if what == "item":
            await stage.sessions.delete_item(session_id, long.id)
        elif what == "turn":
            await stage.sessions.delete_turn(session_id, turn.id)
        else:
            await stage.sessions.delete_session(session_id)
        error = EventsDeletedError if what == "item" else SessionNotFoundError
        with pytest.raises(error):
            await read_on(log, read[-1].seq)


class HeadGoes(MemoryStore):
    """Deletes the head just before the path to it is read, once."""

    def __init__(self) -> None:
        super().__init__()
        self.deletes: str | None = None

    async def list_path(self, session_id: str, turn_id: str, **rest: Any) -> Any:
        deletes, self.deletes = self.deletes, None
        if deletes is not None:
            await self.delete_turns(session_id, deletes, now=NOW)
        return await super().list_path(session_id, turn_id, **rest)


@pytest.mark.parametrize(("deleted", "listed"), [(2, "aAbB"), (0, "")])
async def test_messages_are_listed_to_the_new_head_if_the_head_is_deleted_meanwhile(
    autojump_clock: MockClock, deleted: int, listed: str
) -> None:
    store = HeadGoes()
    async with open_stage(store) as stage:
        session_id, turns = await a_conversation(stage)
        store.deletes = turns[deleted].id
        assert await texts_of(stage, session_id) == listed


async def test_a_deletion_waits_for_an_acceptance_and_then_finds_its_turn(autojump_clock: MockClock) -> None:
    store = Hangs("begin_turn")
    async with open_stage(store) as stage:
        session_id, turns = await a_conversation(stage)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start, stage.sessions, session_id)
            await store.reached.wait()

            async def delete() -> None:
                with pytest.raises(TurnInProgressError):
                    await stage.sessions.delete_turn(session_id, turns[2].id)

            nursery.start_soon(delete)
            await wait_all_tasks_blocked()
            store.goes_on.set()
        (await stage.puppet.next_reply()).finish()


async def test_a_turn_that_is_deleted_alone_leaves_those_that_follow_it_also_one_that_is_just_being_accepted(
    autojump_clock: MockClock,
) -> None:
    async with open_stage() as stage:
        session_id, (first, second, last) = await a_conversation(stage)
        await stage.sessions.delete_turn_alone(session_id, first.id, with_session=True)
        assert await texts_of(stage, session_id) == "bBcC"
        items = NewItems(items=(asks("d"), says("D")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.sessions.add_items, session_id, items)
            await trio.lowlevel.checkpoint()
            nursery.start_soon(partial(stage.sessions.delete_turn_alone, session_id, last.id, with_session=True))
        assert await texts_of(stage, session_id) == "bBdD"
        head = (await stage.sessions.get_session(session_id)).head
        for turn_id in (second.id, head or ""):
            await stage.sessions.delete_turn_alone(session_id, turn_id, with_session=True)
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.get_session(session_id)


async def test_a_turn_is_not_deleted_alone_while_one_that_follows_it_is_open(autojump_clock: MockClock) -> None:
    store = Hangs("begin_turn")
    async with open_stage(store) as stage:
        session_id, turns = await a_conversation(stage)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start, stage.sessions, session_id)
            await store.reached.wait()

            async def delete() -> None:
                with pytest.raises(TurnInProgressError):
                    await stage.sessions.delete_turn_alone(session_id, turns[2].id, with_session=True)

            nursery.start_soon(delete)
            await wait_all_tasks_blocked()
            store.goes_on.set()
        (await stage.puppet.next_reply()).finish()


@pytest.mark.parametrize("changed", [None, *(name for name in PATCHED_FIELDS if name != "idle_timeout_s")])
async def test_a_session_goes_with_its_last_turn_if_that_is_wanted_and_it_has_nothing_of_its_own(
    autojump_clock: MockClock, changed: str | None
) -> None:
    values: dict[str, Any] = {"temperature": 0.5, "max_output_tokens": 5, "metadata": {"a": "b"}}
    async with open_stage() as stage:
        for with_session in (False, True):
            session_id = (await stage.sessions.create_session(NewSession())).id
            (turn,) = await stage.sessions.add_items(session_id, NewItems(items=(asks("a"), says("A"))))
            if changed is not None:
                patch = SessionPatch(**{changed: values.get(changed, "scripted")})
                await stage.sessions.update_session(session_id, patch)
            await stage.sessions.delete_turn_alone(session_id, turn.id, with_session=with_session)
            if with_session and changed is None:
                with pytest.raises(SessionNotFoundError):
                    await stage.sessions.get_session(session_id)
            else:
                assert (await stage.sessions.get_session(session_id)).head is None


@pytest.mark.parametrize("what", ["item", "turn", "turn alone"])
async def test_a_deletion_that_is_cancelled_is_done_or_not(autojump_clock: MockClock, what: str) -> None:
    texts: set[str] = set()
    for nth in range(14):
        async with open_stage() as stage:
            session_id, turns = await a_conversation(stage)
            with trio.CancelScope() as scope:
                instrument = CancelAtWait(nth, scope)
                trio.lowlevel.add_instrument(instrument)
                try:
                    if what == "item":
                        await stage.sessions.delete_item(session_id, "o_B")
                    elif what == "turn alone":
                        await stage.sessions.delete_turn_alone(session_id, turns[1].id, with_session=True)
                    else:
                        await stage.sessions.delete_turn(session_id, turns[1].id)
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            texts.add(await texts_of(stage, session_id))
            await stage.sessions.delete_turn(session_id, turns[0].id)
    assert texts == {"aAbBcC", {"item": "aAbcC", "turn": "aA", "turn alone": "aAcC"}[what]}


async def test_a_store_that_hangs_and_a_session_that_is_deleted_refuse(autojump_clock: MockClock) -> None:
    store = Hangs("delete_turns")
    async with open_stage(store) as stage:
        session_id, turns = await a_conversation(stage)
        with pytest.raises(StoreError):
            await stage.sessions.delete_turn(session_id, turns[0].id)
        assert await texts_of(stage, session_id) == "aAbBcC"
        store.goes_on.set()
        await stage.sessions.delete_session(session_id)
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.delete_turn(session_id, turns[0].id)
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.delete_item(session_id, "i_a")


def test_deleted_events_are_not_taken_for_lost_ones() -> None:
    assert not issubclass(EventsDeletedError, EventsLostError)
