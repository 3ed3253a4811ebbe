"""Forks: the events and the prompt of a copy, and the cases without a copy."""

from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import EventsLostError, SessionNotFoundError, ShuttingDownError, StoreError, TurnInProgressError
from service.models.client import Message
from service.sessions.commands import NewSession
from service.sessions.events.events import TurnInterrupted, TurnQueued, TurnStarted
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from service.storage.records import SEQ_AFTER_CRASH
from tests.sessions.active.test_refusing_store import FullDisk
from tests.sessions.puppet import Stage, frames_in, open_stage, read_all
from tests.sessions.turns.test_turns import start
from tests.storage.rows import T0, a_session, a_turn, ended, said


async def converse(stage: Stage) -> str:
    """A session of two turns, the second of which was queued first and cancelled in the end."""
    session_id = (await stage.sessions.create_session(NewSession(system_message="Be brief."))).id
    first = await start(stage.sessions, session_id, "1")
    second = await start(stage.sessions, session_id, "2", on_conflict="queue")
    reply = await stage.puppet.next_reply()
    reply.think("hm")
    reply.say("one", ' "turn_id":')
    reply.finish()
    await first.wait_ended()
    reply = await stage.puppet.next_reply()
    reply.say("half")
    await wait_all_tasks_blocked()
    await stage.sessions.cancel_turn(session_id, second.id)
    return session_id


async def test_a_copy_replays_what_was_sent_with_ids_of_its_own(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        source = await converse(stage)
        copy = (await stage.sessions.fork_session(source)).id
        originals = (await stage.sessions.list_turns(source, limit=10)).data
        copies = (await stage.sessions.list_turns(copy, limit=10)).data
        assert [turn.text for turn in copies] == ['one "turn_id":', "half"]
        for original, copied in zip(originals, copies, strict=True):
            log, _ = await stage.sessions.open_events(source, original.id)
            copied_log, _ = await stage.sessions.open_events(copy, copied.id)
            renamed = [
                frame.replace(original.id.encode(), copied.id.encode()).replace(source.encode(), copy.encode())
                for frame in await frames_in(log)
            ]
            assert await frames_in(copied_log) == renamed
            assert copied_log.closed
        copied_log, _ = await stage.sessions.open_events(copy, copies[1].id)
        events = await read_all(copied_log)
        assert isinstance(events[0], TurnQueued)
        assert isinstance(events[1], TurnStarted)
        assert events[0].turn_id == events[1].turn_id == copies[1].id
        log, _ = await stage.sessions.open_events(copy, copies[1].id, after=2)
        assert len(await read_all(log, after=2)) == len(events) - 2


async def test_events_that_a_crash_took_are_missing_in_the_copy_and_reported_as_lost(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_stage(store) as stage:
        await store.create_session(a_session(idle_timeout_s=1e9), now=T0)
        await store.begin_turn(a_turn(), now=T0)
        crashed = msgspec.structs.replace(ended(a_turn(), "interrupted"), reason="crash", last_seq=SEQ_AFTER_CRASH)
        await store.end_turn(crashed, runs=said("Hi"), now=T0)
        copy = await stage.sessions.fork_session("s")
        assert copy.head is not None
        log, _ = await stage.sessions.open_events(copy.id, copy.head)
        last = (await read_all(log))[-1]
        assert isinstance(last, TurnInterrupted)
        assert (last.seq, last.reason) == (SEQ_AFTER_CRASH, "crash")
        with pytest.raises(EventsLostError):
            await stage.sessions.open_events(copy.id, copy.head, after=5)


async def test_a_copy_goes_on_from_the_turn_it_was_made_at(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        source = await converse(stage)
        first = (await stage.sessions.list_turns(source, limit=1)).data[0]
        copy = (await stage.sessions.fork_session(source, at=first.id, copy_id="chosen")).id
        assert copy == "chosen"
        turn = await start(stage.sessions, copy, "other")
        reply = await stage.puppet.next_reply()
        assert reply.request.prompt == (
            Message("system", "Be brief."),
            Message("user", "1"),
            Message("assistant", 'one "turn_id":'),
            Message("user", "other"),
        )
        reply.finish()
        assert (await turn.wait_ended()).parent == (await stage.sessions.list_turns(copy, limit=1)).data[0].id


async def test_a_running_turn_is_in_the_way_unless_an_earlier_one_is_named(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        source = await converse(stage)
        head = (await stage.sessions.get_session(source)).head
        running = await start(stage.sessions, source, "3")
        with pytest.raises(TurnInProgressError) as refused:
            await stage.sessions.fork_session(source)
        assert refused.value.turn_id == running.id
        assert (await stage.sessions.fork_session(source, at=head)).message_count == 4


async def test_a_session_that_is_being_deleted_is_not_forked(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_stage() as stage, trio.open_nursery() as nursery:
        source = await converse(stage)
        go_on = trio.Event()
        mark_deleted = stage.store.mark_deleted

        async def wait_and_mark(session_id: str, **arguments: Any) -> None:
            await go_on.wait()
            await mark_deleted(session_id, **arguments)

        monkeypatch.setattr(stage.store, "mark_deleted", wait_and_mark)
        nursery.start_soon(stage.sessions.delete_session, source)
        await wait_all_tasks_blocked()
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.fork_session(source)
        go_on.set()


async def test_a_service_that_stops_forks_nothing(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        source = await converse(stage)
        stage.stop.enter(Phase.DRAINING)
        with pytest.raises(ShuttingDownError):
            await stage.sessions.fork_session(source)


async def test_a_turn_whose_end_could_not_be_kept_is_not_copied_before_it_is(autojump_clock: MockClock) -> None:
    store = FullDisk("end_turn")
    async with open_stage(store) as stage:
        source = (await stage.sessions.create_session(NewSession())).id
        turn = await start(stage.sessions, source, "1")
        (await stage.puppet.next_reply()).finish()
        await turn.wait_ended()
        with pytest.raises(StoreError, match="could not be stored yet"):
            await stage.sessions.fork_session(source)
        store.refused.clear()
        await stage.sessions.pending_writes.retry()
        assert (await stage.sessions.fork_session(source)).message_count == 1
