"""Items that are added to a conversation: the turns that they become, their events, and what is in their way."""

from collections.abc import Sequence

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import SessionNotFoundError, ShuttingDownError, StoreError, TurnInProgressError, TurnNotFoundError
from service.models.client import Message
from service.sessions.commands import INPUT_ITEMS_MAX, NewItems, NewSession, turns_of
from service.sessions.events.events import TurnCompleted, TurnDelta, TurnStarted
from service.settings import Settings
from service.stop_state import Phase
from service.storage.records import Item
from tests.sessions.active.test_acceptance import Hangs
from tests.sessions.puppet import kinds, open_stage, read_all
from tests.sessions.turns.test_calls_in_prompts import asks, brings, calls, says
from tests.sessions.turns.test_notes_in_prompts import notes
from tests.sessions.turns.test_turns import start
from tests.storage.test_store_cancellation import CancelAtWait

EXCHANGE = NewItems(items=(asks("a"), says("A")))


def cut(*items: Item, **settings: int) -> list[str]:
    """The turns of a conversation in short: the texts of input and output."""
    return [
        f"{','.join(item.text for item in said)}|{','.join(item.text for item in replied)}"
        for said, replied in turns_of(items, Settings.model_validate(settings))
    ]


def test_a_question_and_its_answer_are_a_turn() -> None:
    assert cut(asks("a"), says("A"), asks("b"), says("B"), asks("c")) == ["a|A", "b|B", "c|"]
    assert cut(says("Hello"), asks("a"), notes("n"), says("A"), notes("m")) == ["|Hello", "a,n|A", "m|"]


def test_an_output_begins_a_turn_and_calls_are_a_part_of_the_reply() -> None:
    call = calls("1")
    assert cut(asks("a"), says("A"), call, says("more"), brings("1"), brings("2"), says("B")) == [
        f"a|A,{call.text},more",
        "out,out|B",
    ]


def test_two_texts_of_the_model_without_a_call_between_them_are_two_turns() -> None:
    assert cut(asks("a"), says("A"), says("B")) == ["a|A", "|B"]


def test_what_is_too_much_for_one_turn_is_cut() -> None:
    assert cut(asks("a" * 600), asks("b" * 600), input_bytes_max=1024) == ["a" * 600 + "|", "b" * 600 + "|"]
    long = msgspec.structs.replace(calls("1"), text="1" * 600)
    assert cut(asks("a"), says("A" * 600), long, reply_bytes_max=1024) == [f"a|{'A' * 600}", f"|{'1' * 600}"]
    inputs = [len(said) for said, _ in turns_of([asks("a")] * (INPUT_ITEMS_MAX + 1), Settings())]
    assert inputs == [INPUT_ITEMS_MAX, 1]


async def test_added_items_are_turns_with_events_and_in_the_next_prompt(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession(system_message="S"))).id
        turns = await stage.sessions.add_items(session_id, NewItems(items=(asks("a"), says("A"), notes("n"))))
        assert [turn.parent for turn in turns] == [None, turns[0].id]
        assert (await stage.sessions.get_session(session_id)).head == turns[1].id
        messages = await stage.sessions.list_messages(session_id, limit=10)
        assert [message.item.text for message in messages.data] == ["a", "A", "n"]
        for turn in turns:
            assert await stage.sessions.get_turn(session_id, turn.id) == turn
        log, _ = await stage.sessions.open_events(session_id, turns[0].id)
        assert await read_all(log) == [
            TurnStarted(seq=1, session_id=session_id, turn_id=turns[0].id, model="scripted"),
            TurnDelta(seq=2, text="A"),
            TurnCompleted(seq=3, finish_reason="stop", usage=None, text_length=1),
        ]
        log, _ = await stage.sessions.open_events(session_id, turns[1].id, after=1)
        assert kinds(await read_all(log, after=1)) == ["turn.completed"]
        asking = await start(stage.sessions, session_id, "now")
        reply = await stage.puppet.next_reply()
        assert reply.request.prompt == (
            *(Message("system", "S"), Message("user", "a"), Message("assistant", "A")),
            *(Message("system", "n"), Message("user", "now")),
        )
        reply.finish()
        assert (await asking.wait_ended()).parent == turns[1].id


async def test_a_turn_with_calls_is_told_as_the_model_would_have_told_it(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        items = (asks("a"), says("A"), calls("1"), brings("1"))
        turn, _ = await stage.sessions.add_items(session_id, NewItems(items=items))
        assert turn.finish_reason == "tool_calls"
        log, _ = await stage.sessions.open_events(session_id, turn.id)
        assert kinds(await read_all(log)) == [
            *("turn.started", "turn.delta", "turn.call", "turn.arguments", "turn.completed"),
        ]


async def test_nothing_is_added_while_a_turn_is_open_but_beside_it(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        (ended,) = await stage.sessions.add_items(session_id, EXCHANGE)
        running = await start(stage.sessions, session_id)
        for new in (EXCHANGE, msgspec.structs.replace(EXCHANGE, parent=running.id)):
            with pytest.raises(TurnInProgressError):
                await stage.sessions.add_items(session_id, new)
        with pytest.raises(TurnNotFoundError):
            await stage.sessions.add_items(session_id, msgspec.structs.replace(EXCHANGE, parent=f"turn_{'0' * 32}"))
        for parent in (ended.id, None):
            (beside,) = await stage.sessions.add_items(session_id, msgspec.structs.replace(EXCHANGE, parent=parent))
            assert beside.parent == parent
            assert (await stage.sessions.get_session(session_id)).head == beside.id
        (await stage.puppet.next_reply()).finish()
        await running.wait_ended()
        assert (await stage.sessions.get_session(session_id)).message_count == 7


async def test_added_items_wait_for_a_turn_that_is_being_accepted(autojump_clock: MockClock) -> None:
    store = Hangs("begin_turn")
    async with open_stage(store) as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start, stage.sessions, session_id)
            await store.reached.wait()

            async def add() -> None:
                with pytest.raises(TurnInProgressError):
                    await stage.sessions.add_items(session_id, EXCHANGE)

            nursery.start_soon(add)
            await wait_all_tasks_blocked()
            store.goes_on.set()
        (await stage.puppet.next_reply()).finish()


async def test_an_added_conversation_that_is_cancelled_is_whole_or_not_there(autojump_clock: MockClock) -> None:
    counts: list[int] = []
    for nth in range(12):
        async with open_stage() as stage:
            session_id = (await stage.sessions.create_session(NewSession())).id
            items: Sequence[Item] = (asks("a"), says("A"), asks("b"), says("B"))
            with trio.CancelScope() as scope:
                instrument = CancelAtWait(nth, scope)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await stage.sessions.add_items(session_id, NewItems(items=tuple(items)))
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            counts.append((await stage.sessions.get_session(session_id)).message_count)
            assert scope.cancelled_caught or counts[-1] == 4
            await stage.sessions.add_items(session_id, EXCHANGE)
    assert set(counts) == {0, 4}


async def test_nothing_is_added_to_a_deleted_session_in_a_drain_or_by_a_store_that_hangs(
    autojump_clock: MockClock,
) -> None:
    store = Hangs("add_turns")
    async with open_stage(store) as stage:
        session_id = (await stage.sessions.create_session(NewSession())).id
        with pytest.raises(StoreError):
            await stage.sessions.add_items(session_id, EXCHANGE)
        assert (await stage.sessions.get_session(session_id)).head is None
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.add_items("none", EXCHANGE)
        stage.stop.enter(Phase.DRAINING)
        with pytest.raises(ShuttingDownError):
            await stage.sessions.add_items(session_id, EXCHANGE)
