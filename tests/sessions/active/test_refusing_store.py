"""The state after the store refuses a write, and its repair."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import SessionExistsError, SessionNotFoundError, StoreError, TurnLimitError
from service.sessions.commands import NewSession, NewTurn
from service.sessions.upkeep.recovery import INTERVAL_S, recover_once, run_recovery
from service.storage.memory import MemoryStore
from service.storage.records import EndResult, SessionRecord, TurnRecord
from tests.sessions.puppet import Stage, frames_of, open_stage
from tests.sessions.turns.test_turns import start


class FullDisk(MemoryStore):
    """Reads work; the store refuses the steps in ``refused``, for all turns or for one."""

    def __init__(self, *refused: str, only_turn: int | None = None) -> None:
        super().__init__()
        self.refused = set(refused)
        self.only_turn = only_turn
        self.attempts = 0

    def _check(self, step: str) -> None:
        if step in self.refused:
            raise StoreError("disk full")

    async def begin_turn(self, turn: TurnRecord, **rest: object) -> object:  # type: ignore[override]
        self._check("begin_turn")
        return await super().begin_turn(turn, **rest)  # type: ignore[arg-type]

    async def end_turn(self, turn: TurnRecord, **rest: object) -> EndResult:
        self.attempts += 1
        if self.only_turn is None or turn.input[0].text == f"turn {self.only_turn}":
            self._check("end_turn")
        return await super().end_turn(turn, **rest)  # type: ignore[arg-type]

    async def remove_deleted(self, session_id: str) -> None:
        self._check("remove_deleted")
        await super().remove_deleted(session_id)


async def end_turns(stage: Stage, count: int) -> list[str]:
    """Run ``count`` turns to their ends, each in a session of its own, and return the ids of the sessions."""
    ids = []
    for number in range(count):
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id, f"turn {number}")
        (await stage.puppet.next_reply()).finish()
        await turn.wait_ended()
        ids.append(session.id)
    await wait_all_tasks_blocked()
    return ids


async def test_refused_acceptances_are_bounded_like_live_turns(autojump_clock: MockClock) -> None:
    store = FullDisk("begin_turn")
    async with open_stage(store, live_turns_max=5) as stage:
        for _ in range(5):
            other = await stage.sessions.create_session(NewSession())
            with pytest.raises(StoreError):
                await start(stage.sessions, other.id)
        session = await stage.sessions.create_session(NewSession())
        with pytest.raises(TurnLimitError):
            await start(stage.sessions, session.id)
        store.refused.clear()
        await stage.sessions.pending_writes.retry()
        await start(stage.sessions, session.id)


async def test_store_that_is_full_is_one_that_takes_writes(autojump_clock: MockClock) -> None:
    async with open_stage(MemoryStore(sessions_max=1)) as stage:
        await stage.sessions.create_session(NewSession())
        stage.sessions.pending_writes.refusal = StoreError("disk full")
        await stage.sessions.pending_writes.retry()
        assert stage.sessions.pending_writes.refusal is None


async def test_one_end_that_is_refused_again_does_not_hold_up_the_others(autojump_clock: MockClock) -> None:
    store = FullDisk("end_turn")
    async with open_stage(store) as stage:
        await end_turns(stage, 3)
        assert stage.sessions.statistics().ends_not_stored == 3
        store.only_turn = 0
        with pytest.raises(StoreError):
            await stage.sessions.pending_writes.retry()
        assert stage.sessions.statistics().ends_not_stored == 1


async def test_two_retries_may_run_at_once(autojump_clock: MockClock) -> None:
    store = FullDisk("end_turn")
    async with open_stage(store) as stage:
        await end_turns(stage, 3)
        store.refused.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.sessions.pending_writes.retry)
            nursery.start_soon(stage.sessions.pending_writes.retry)
        assert stage.sessions.statistics().ends_not_stored == 0


async def test_deleted_session_takes_along_the_ends_that_were_not_stored(autojump_clock: MockClock) -> None:
    store = FullDisk("end_turn")
    async with open_stage(store) as stage:
        (session_id,) = await end_turns(stage, 1)
        (turn,) = (await store.list_turns(session_id, limit=2, after=None, now=stage.clock())).data
        await stage.sessions.delete_session(session_id)
        for call in (stage.sessions.get_turn, stage.sessions.cancel_turn, stage.sessions.open_events):
            with pytest.raises(SessionNotFoundError):
                await call(session_id, turn.id)
        assert stage.sessions.statistics().ends_not_stored == 0


@pytest.mark.parametrize("by", ["second delete", "recovery"])
async def test_deletion_whose_last_step_was_refused_is_finished_later(autojump_clock: MockClock, by: str) -> None:
    store = FullDisk("remove_deleted")
    async with open_stage(store) as stage:
        session = await stage.sessions.create_session(NewSession(id="mine"))
        with pytest.raises(StoreError):
            await stage.sessions.delete_session(session.id)
        with pytest.raises(SessionNotFoundError):
            await stage.sessions.get_session(session.id)
        store.refused.clear()
        if by == "recovery":
            await recover_once(stage.sessions, shared=False)
            await wait_all_tasks_blocked()
        else:
            await stage.sessions.delete_session(session.id)
        await stage.sessions.create_session(NewSession(id="mine"))
        await stage.sessions.get_session("mine")


async def test_an_end_that_breaks_the_store_is_given_up_and_delays_no_other_end(autojump_clock: MockClock) -> None:
    class Breaks(FullDisk):
        def _check(self, step: str) -> None:
            if step in self.refused:
                raise OverflowError("too large for it")

    store = Breaks("end_turn")
    with capture_logs() as logged:
        async with open_stage(store) as stage:
            ids = await end_turns(stage, 2)
            assert stage.sessions.pending_writes.turns == 2
            store.only_turn = 0
            await stage.sessions.pending_writes.retry()
            assert stage.sessions.pending_writes.turns == 0
            assert stage.sessions.pending_writes.refusal is None
            states = [(await stage.store.get_session(name, now=stage.clock())).open_turns for name in ids]
            assert states == [1, 0], "the first is the next start's to end"
            assert stage.sessions.statistics().turns_crashed == 0
    assert [line["event"] for line in logged if line["log_level"] == "error"] == [
        "storing the end of a turn failed",
        "storing the end of a turn failed",
        "storing the end of a turn failed; giving this write up",
    ]


async def test_an_end_that_the_store_does_not_take_any_more_is_not_called_stored(autojump_clock: MockClock) -> None:
    """Another process took this process for dead."""

    class Fenced(MemoryStore):
        async def end_turn(self, *_: object, **__: object) -> EndResult:
            await trio.lowlevel.checkpoint()
            return EndResult.LOST

    async with open_stage(Fenced()) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        (await stage.puppet.next_reply()).finish()
        await turn.wait_ended()
        await wait_all_tasks_blocked()
        assert b'"stored":false' in frames_of(turn.log)[-1]
        assert stage.sessions.pending_writes.turns == 0, "the end is tried again, although the store will never take it"
        assert stage.sessions.pending_writes.refusal is None, "the store did not refuse"


async def test_a_deletion_is_not_finished_by_others_before_its_turns_have_ended(autojump_clock: MockClock) -> None:
    async with open_stage() as stage, trio.open_nursery() as nursery:
        session = await stage.sessions.create_session(NewSession(id="s"))
        turn = await start(stage.sessions, session.id)
        await stage.puppet.next_reply()
        stage.puppet.close_s = 5
        nursery.start_soon(stage.sessions.delete_session, "s")
        await wait_all_tasks_blocked()
        await recover_once(stage.sessions, shared=False)
        assert not turn.ended.is_set()
        with pytest.raises(SessionExistsError):
            await stage.store.create_session(session, now=stage.clock())
        await turn.wait_ended()
    assert turn.stored


async def test_mending_goes_on_where_the_turns_of_others_cannot_be_ended(autojump_clock: MockClock) -> None:
    class NoRecovery(FullDisk):
        async def recover(self, **_: object) -> int:
            await trio.lowlevel.checkpoint()
            raise StoreError("busy")

    store = NoRecovery("end_turn")
    async with open_stage(store) as stage:
        await end_turns(stage, 1)
        store.refused.clear()
        with pytest.raises(StoreError):
            await recover_once(stage.sessions, shared=True)
        assert stage.sessions.pending_writes.turns == 0


@pytest.mark.parametrize(("step_s", "steps", "in_time"), [(4, 10, True), (6, 1, False)])
async def test_a_recovery_may_take_many_steps_but_none_too_long(
    autojump_clock: MockClock, step_s: float, steps: int, in_time: bool
) -> None:
    class Recovering(MemoryStore):
        async def recover(self, *, now: datetime, after_step: Callable[[], None] | None = None) -> int:
            assert after_step is not None
            for _ in range(steps):
                await trio.sleep(step_s)
                after_step()
            return steps

    async with open_stage(Recovering(), store_timeout_s=5) as stage:
        if in_time:
            assert await stage.sessions.recover() == steps
        else:
            with pytest.raises(StoreError):
                await stage.sessions.recover()


async def test_the_test_write_is_visible_to_no_caller(autojump_clock: MockClock) -> None:
    """This is also true after the clock is set back."""
    async with open_stage() as stage:
        stage.sessions.pending_writes.refusal = StoreError("of a write that is not tried again")
        await stage.sessions.pending_writes.retry()
        assert stage.sessions.pending_writes.refusal is None, "it can be written to"
        stage.clock.advance(-3600)
        assert await stage.sessions.count_sessions() == 0


async def test_a_fork_that_waits_for_others_says_nothing_about_the_store(autojump_clock: MockClock) -> None:
    class Slow(MemoryStore):
        async def fork_session(self, *arguments: Any, **named: Any) -> SessionRecord:
            await trio.sleep(2)
            return await super().fork_session(*arguments, **named)

    made: list[SessionRecord] = []
    refused: list[StoreError] = []
    async with open_stage(Slow(), store_timeout_s=5) as stage:
        session = await stage.sessions.create_session(NewSession())

        async def fork() -> None:
            try:
                made.append(await stage.sessions.fork_session(session.id))
            except StoreError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fork)
        assert (len(made), len(refused)) == (2, 1), "the second waits 2 s, the third would 4"
        assert stage.sessions.pending_writes.refusal is None
        await stage.sessions.fork_session(session.id)


async def test_mending_loop_gives_the_store_what_it_refused(autojump_clock: MockClock) -> None:
    store = FullDisk("end_turn")
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: run_recovery(stage.sessions, shared=False, task_status=task_status))
        await end_turns(stage, 2)
        await trio.sleep(3 * INTERVAL_S)
        assert stage.sessions.statistics().ends_not_stored == 2
        store.refused.clear()
        await trio.sleep(INTERVAL_S + 0.1)
        assert stage.sessions.statistics().ends_not_stored == 0
        nursery.cancel_scope.cancel()


async def test_end_that_the_unwinding_stored_counts_as_stored(autojump_clock: MockClock) -> None:
    store = FullDisk()
    async with open_stage(store) as stage:
        session = await stage.sessions.create_session(NewSession())
        await start(stage.sessions, session.id)
        await stage.puppet.next_reply()
    assert stage.sessions.statistics().ends_not_stored == 0
    assert store.attempts == 1


async def test_long_failed_reply_leaves_the_conversation_in_the_prompt(autojump_clock: MockClock) -> None:
    async with open_stage(input_bytes_max=1024, prompt_bytes_max=2048, reply_bytes_max=4096) as stage:
        session = await stage.sessions.create_session(NewSession())
        for text, reply_text, state in (("my name is Ada", "hello", "completed"), ("go on", "x" * 4096, "failed")):
            turn = await start(stage.sessions, session.id, text)
            reply = await stage.puppet.next_reply()
            reply.say(reply_text, *("y" if state == "failed" else ""))
            reply.finish()
            assert (await turn.wait_ended()).state == state
        await start(stage.sessions, session.id, "what is my name?")
        reply = await stage.puppet.next_reply()
        assert [message.text for message in reply.request.prompt] == [
            "my name is Ada",
            "hello",
            "go on\n\nwhat is my name?",
        ]


async def test_deadline_that_has_passed_comes_before_a_cause_in_the_same_moment(autojump_clock: MockClock) -> None:
    async with open_stage(turn_timeout_s=5) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="x"))
        await stage.puppet.next_reply()
        autojump_clock.jump(5)
        watch.release()
        record = await turn.wait_ended()
        assert record.error is not None
        assert record.error.code == "turn_timeout"
