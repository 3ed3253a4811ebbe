"""Turns of a process that has them on a lease: an end is told once, by the process that has kept it."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import StoreError, TurnMovedError
from service.sessions.commands import NewSession
from service.sessions.events.events import TurnCancelled, TurnCompleted
from service.sessions.turns.turn import Turn
from service.sessions.turns.turn_task import UNTOLD_MAX_S
from service.sessions.upkeep.recovery import recover_once
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from service.storage.records import EndResult, TurnRecord
from service.storage.standing import Standing
from tests.sessions.puppet import Reply, Stage, open_stage, pieces_of, read_all
from tests.sessions.turns.test_turns import start

LEASE_S = 6.0


class LeasedStore(MemoryStore):
    """A memory store whose owner lives on a lease. While it is away, it takes no ends."""

    def __init__(self) -> None:
        super().__init__()
        self.standing = Standing(lease_s=LEASE_S, monotonic=trio.current_time)
        self.is_away = False
        self.attempts = 0

    async def end_turn(self, turn: TurnRecord, **rest: object) -> EndResult:
        self.attempts += 1
        if self.standing.is_lost:
            return EndResult.LOST
        if self.is_away:
            raise StoreError("The database does not answer.")
        return await super().end_turn(turn, **rest)  # type: ignore[arg-type]

    def come_back(self) -> None:
        self.is_away = False
        self.standing.note_beat(trio.current_time())


async def begin(stage: Stage) -> tuple[Turn, Reply]:
    session = await stage.sessions.create_session(NewSession())
    turn = await start(stage.sessions, session.id)
    reply = await stage.puppet.next_reply()
    reply.say("Hi")
    await wait_all_tasks_blocked()
    return turn, reply


async def test_an_end_waits_for_a_store_that_is_away_while_tokens_go_on(autojump_clock: MockClock) -> None:
    store = LeasedStore()
    async with open_stage(store) as stage:
        ending, ends = await begin(stage)
        running, goes_on = await begin(stage)
        store.is_away = True
        ends.finish()
        await trio.sleep(2 * LEASE_S)
        assert not ending.log.closed
        assert not store.standing.is_certain
        goes_on.say(" there")
        await wait_all_tasks_blocked()
        assert pieces_of(running.log) == ["Hi", " there"], "streams go on"
        store.come_back()
        record = await ending.wait_ended()
        assert (record.state, record.stored) == ("completed", True)
        goes_on.finish()
        assert (await running.wait_ended()).stored
        for turn in (ending, running):
            events = await read_all(turn.log)
            assert [type(event) for event in events if isinstance(event, TurnCompleted)] == [TurnCompleted]


async def test_an_end_that_waits_is_tried_again_with_each_beat(autojump_clock: MockClock) -> None:
    store = LeasedStore()
    async with open_stage(store) as stage:
        turn, reply = await begin(stage)
        store.is_away = True
        reply.finish()
        await wait_all_tasks_blocked()
        before = store.attempts
        for _ in range(3):
            store.standing.note_beat(trio.current_time())  # it answers, and refuses writes
            await wait_all_tasks_blocked()
        assert store.attempts == before + 3
        assert not turn.log.closed
        store.come_back()
        assert (await turn.wait_ended()).stored


async def test_an_end_waits_no_longer_once_the_store_says_that_the_turn_is_gone(autojump_clock: MockClock) -> None:
    """Its session was deleted meanwhile, say, by another process."""
    store = LeasedStore()
    async with open_stage(store) as stage:
        turn, reply = await begin(stage)
        store.is_away = True
        reply.finish()
        await wait_all_tasks_blocked()
        await store.mark_deleted(turn.session_id, now=stage.clock())
        await store.remove_deleted(turn.session_id)
        before, now = store.attempts, trio.current_time()
        store.come_back()
        assert not (await turn.wait_ended()).stored
        assert (store.attempts, trio.current_time()) == (before + 1, now)


async def test_an_end_that_nobody_else_can_have_told_is_told_in_the_end_without_the_store(
    autojump_clock: MockClock,
) -> None:
    store = LeasedStore()
    async with open_stage(store) as stage:
        turn, reply = await begin(stage)
        store.is_away = True
        reply.finish()
        with trio.move_on_after(UNTOLD_MAX_S - 1):
            while True:
                await trio.sleep(1)
                store.standing.note_beat(trio.current_time())
        assert not turn.log.closed
        await trio.sleep(1.5)
        record = await turn.wait_ended()
        assert (record.state, record.stored) == ("completed", False)
        assert stage.sessions.statistics().ends_not_stored == 1
        store.come_back()
        await stage.sessions.pending_writes.retry()


async def test_an_end_that_another_process_may_have_told_is_not_told_and_kept_later(
    autojump_clock: MockClock,
) -> None:
    store = LeasedStore()
    async with open_stage(store) as stage:
        turn, reply = await begin(stage)
        store.is_away = True
        reply.finish()
        with trio.fail_after(UNTOLD_MAX_S + 1), pytest.raises(TurnMovedError):
            await turn.wait_ended()
        assert turn.log.is_moved
        assert (await stage.sessions.get_turn(turn.session_id, turn.id)).is_open, "no end is told to anyone who asks"
        assert stage.sessions.statistics().ends_not_stored == 1
        store.come_back()
        await recover_once(stage.sessions, shared=False)
        assert stage.sessions.statistics().ends_not_stored == 0
        kept = await stage.sessions.get_turn(turn.session_id, turn.id)
        assert (kept.state, kept.text, kept.stored) == ("completed", "Hi", True)
        log, watch = await stage.sessions.open_events(turn.session_id, turn.id)
        watch.release()
        *_, end = await read_all(log)
        assert isinstance(end, TurnCompleted)
        assert (end.seq, kept.last_seq) == (turn.log.last_seq + 1, end.seq)


@pytest.mark.parametrize("is_certain", [True, False])
async def test_a_stop_ends_the_wait_within_the_time_of_a_store(autojump_clock: MockClock, is_certain: bool) -> None:
    store = LeasedStore()
    async with open_stage(store) as stage:
        turn, reply = await begin(stage)
        store.is_away = True
        reply.finish()
        await trio.sleep(LEASE_S)
        if is_certain:
            store.standing.note_beat(trio.current_time())
        stage.stop.enter(Phase.INTERRUPTING)
        stage.sessions.drain.interrupt_all()
        with trio.fail_after(1):
            await stage.sessions.drain.wait_idle()
        assert turn.log.has_ended is is_certain
        store.come_back()
        await stage.sessions.pending_writes.retry()


async def test_a_crash_of_the_service_does_not_wait_for_the_store(autojump_clock: MockClock) -> None:
    store = LeasedStore()
    with trio.fail_after(LEASE_S + 1):
        async with open_stage(store) as stage:
            turn, reply = await begin(stage)
            store.is_away = True
            reply.finish()
            await trio.sleep(LEASE_S)
    assert turn.log.is_moved


async def test_a_process_that_has_lost_its_turns_drops_their_calls_at_once_and_tells_no_end(
    autojump_clock: MockClock,
) -> None:
    store = LeasedStore()
    async with open_stage(store) as stage:
        running, reply = await begin(stage)
        queued = await start(stage.sessions, running.session_id, "next", on_conflict="queue")
        other, ends = await begin(stage)
        store.is_away = True
        ends.finish()
        await wait_all_tasks_blocked()
        before, now = store.attempts, trio.current_time()
        store.standing.lose()
        stage.sessions.lose_turns()
        for turn in (running, queued, other):
            with pytest.raises(TurnMovedError):
                await turn.wait_ended()
        assert reply.closed.is_set()
        assert trio.current_time() == now
        assert store.attempts == before, "no end is given to the store any more"
        assert stage.sessions.statistics().ends_not_stored == 0, "nor later"
        for turn in (running, queued, other):
            assert turn.log.is_moved
            assert not any(isinstance(event, TurnCompleted | TurnCancelled) for event in turn.log.events())


async def test_an_end_that_the_store_refuses_because_the_turns_are_lost_is_not_told(autojump_clock: MockClock) -> None:
    store = LeasedStore()
    async with open_stage(store) as stage:
        turn, reply = await begin(stage)
        store.standing.lose()
        reply.finish()
        with pytest.raises(TurnMovedError):
            await turn.wait_ended()


async def test_a_cancel_of_a_turn_whose_end_waits_says_that_the_end_comes_later(autojump_clock: MockClock) -> None:
    store = LeasedStore()
    async with open_stage(store) as stage:
        turn, reply = await begin(stage)
        store.is_away = True
        reply.finish()
        await wait_all_tasks_blocked()
        with pytest.raises(Exception, match="ending"):
            await stage.sessions.cancel_turn(turn.session_id, turn.id)
        store.come_back()
        assert (await turn.wait_ended()).state == "completed", "the first decision stands"
