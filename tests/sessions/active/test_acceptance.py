"""The acceptance of a turn: either all of its writes and counts exist, or none."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import (
    LimitError,
    SessionNotFoundError,
    ShuttingDownError,
    StoreError,
    TurnInProgressError,
    TurnLimitError,
)
from service.sessions.commands import NewSession, NewTurn
from service.stop_state import Phase
from service.storage.memory import MemoryStore
from service.storage.records import BegunTurn, LeftOut, SessionRecord, TurnRecord
from tests.sessions.puppet import LeavesPathsOut, Stage, open_stage
from tests.sessions.turns.test_turns import start
from tests.storage.rows import a_turn, ended
from tests.storage.test_store_cancellation import CancelAtWait

CHAT = NewTurn(text="hi", creates_session=True)


class AnswersLate(MemoryStore):
    """Does each step some time before its answer arrives."""

    async def begin_turn(self, turn: TurnRecord, **rest: Any) -> BegunTurn:
        begun = await super().begin_turn(turn, **rest)
        await trio.lowlevel.checkpoint()
        return begun


class Hangs(MemoryStore):
    """One kind of step waits until ``goes_on`` is set."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.reached = trio.Event()
        self.goes_on = trio.Event()
        setattr(self, step, partial(self._hang, getattr(self, step)))

    async def _hang(self, step: Callable[..., Awaitable[object]], *args: object, **kwargs: object) -> object:
        self.reached.set()
        await self.goes_on.wait()
        return await step(*args, **kwargs)


async def started_and_cancelled(stage: Stage, nth: int) -> tuple[bool, bool]:
    """Start a turn that creates its session, cancelled at its ``nth`` wait. Returns: was it cancelled, and accepted?"""
    accepted = False
    with trio.CancelScope() as scope:
        if nth == 0:
            scope.cancel()
        instrument = CancelAtWait(nth, scope)
        trio.lowlevel.add_instrument(instrument)
        try:
            _, watch = await stage.sessions.start_turn("me", CHAT)
            accepted = True
        finally:
            trio.lowlevel.remove_instrument(instrument)
        watch.release()
    return scope.cancel_called, accepted


async def test_caller_that_leaves_at_any_wait_leaves_a_session_with_its_turn_or_none(
    autojump_clock: MockClock,
) -> None:
    outcomes = []
    for nth in range(100):
        async with open_stage(AnswersLate()) as stage:
            was_cancelled, accepted = await started_and_cancelled(stage, nth)
            with trio.fail_after(10):
                await stage.sessions.drain.wait_idle()
            sessions = (await stage.sessions.list_sessions(limit=10)).data
            assert [(session.id, session.message_count) for session in sessions] == [("me", 1)] * accepted
            assert stage.sessions.statistics().turns_cancelled == accepted, "and nothing is counted that is not there"
        if not was_cancelled:
            break
        outcomes.append(accepted)
    assert outcomes == sorted(outcomes), "it is cancelled up to its first write, and no more after it"
    assert set(outcomes) == {False, True}


async def test_caller_that_leaves_during_a_write_is_held_no_longer_than_the_store_may_take(
    autojump_clock: MockClock,
) -> None:
    async with open_stage(Hangs("begin_turn"), store_timeout_s=5) as stage:
        with trio.move_on_after(1), pytest.raises(StoreError):
            await stage.sessions.start_turn("me", CHAT)
        assert trio.current_time() == 5


async def full(stage: Stage) -> None:
    await start(stage.sessions, (await stage.sessions.create_session(NewSession(id="other"))).id)


async def closed(stage: Stage) -> None:
    await stage.sessions.create_session(NewSession(id="other"))
    stage.stop.enter(Phase.DRAINING)


@pytest.mark.parametrize(("make", "refusal"), [(full, TurnLimitError), (closed, ShuttingDownError)])
async def test_turn_that_is_refused_creates_no_session(
    make: Callable[[Stage], Awaitable[None]], refusal: type[LimitError], autojump_clock: MockClock
) -> None:
    async with open_stage(live_turns_max=1) as stage:
        await make(stage)
        with pytest.raises(refusal):
            await stage.sessions.start_turn("me", CHAT)
        assert [session.id for session in (await stage.sessions.list_sessions(limit=10)).data] == ["other"]


@pytest.mark.parametrize("session_is_new", [False, True])
async def test_turn_finds_the_session_that_somebody_else_has_created_meanwhile(
    autojump_clock: MockClock, session_is_new: bool
) -> None:
    class Overtaken(MemoryStore):
        async def begin_turn(self, turn: TurnRecord, **rest: Any) -> BegunTurn:
            session: SessionRecord | None = rest.get("creates")
            if session is not None:
                await super().create_session(msgspec.structs.replace(session, title="theirs"), now=rest["now"])
            return await super().begin_turn(turn, **rest)

    async with open_stage(Overtaken()) as stage:
        new = msgspec.structs.replace(CHAT, session_is_new=session_is_new)
        turn, watch = await stage.sessions.start_turn("me", new)
        with watch:
            (await stage.puppet.next_reply()).finish()
            assert (await turn.wait_ended()).state == "completed"
        assert (await stage.sessions.get_session("me")).title == "theirs"


async def test_turn_does_not_bring_back_a_session_that_is_being_deleted(autojump_clock: MockClock) -> None:
    class NeverRemoves(MemoryStore):
        async def remove_deleted(self, session_id: str) -> None:
            raise StoreError("read-only")

    async with open_stage(NeverRemoves()) as stage:
        await stage.sessions.create_session(NewSession(id="me"))
        with pytest.raises(StoreError):
            await stage.sessions.delete_session("me")
        with trio.fail_after(1), pytest.raises(SessionNotFoundError):
            await stage.sessions.start_turn("me", CHAT)


async def test_turn_that_waited_for_another_one_to_be_accepted_is_refused_once_the_service_stops(
    autojump_clock: MockClock,
) -> None:
    store = Hangs("begin_turn")
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        nursery.start_soon(start, stage.sessions, "s")
        await store.reached.wait()
        nursery.start_soon(_refused_as_the_service_stops, stage)
        await wait_all_tasks_blocked()
        stage.stop.enter(Phase.DRAINING)
        store.goes_on.set()


async def _refused_as_the_service_stops(stage: Stage) -> None:
    with pytest.raises(ShuttingDownError):
        await start(stage.sessions, "s", on_conflict="queue")


async def test_turn_whose_session_is_deleted_during_its_acceptance_ends_at_once(autojump_clock: MockClock) -> None:
    class Slow(Hangs):
        async def mark_deleted(
            self, session_id: str, *, now: datetime, revisions: Collection[str] | None = None
        ) -> None:
            await trio.sleep(1)
            await super().mark_deleted(session_id, now=now, revisions=revisions)

    store = Slow("begin_turn")
    async with open_stage(store) as stage, trio.open_nursery() as nursery:
        await stage.sessions.create_session(NewSession(id="s"))
        nursery.start_soon(_ended_at_once, stage)
        await store.reached.wait()
        nursery.start_soon(stage.sessions.delete_session, "s")
        await wait_all_tasks_blocked()
        store.goes_on.set()


async def _ended_at_once(stage: Stage) -> None:
    turn = await start(stage.sessions, "s")
    assert (await turn.wait_ended()).reason == "session_deleted"
    assert trio.current_time() == 0


async def test_turn_that_may_create_its_session_continues_one_that_is_there(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        first, watch = await stage.sessions.start_turn("me", CHAT)
        with watch:
            with pytest.raises(TurnInProgressError):
                await stage.sessions.start_turn("me", CHAT)
            (await stage.puppet.next_reply()).finish()
            await first.wait_ended()
        second, watch = await stage.sessions.start_turn("me", CHAT)
        with watch:
            assert second.record().parent == first.id


class OneStep(MemoryStore):
    """Refuses all reads of a start: the acceptance is its only step."""

    async def get_session(self, session_id: str, *, now: datetime) -> SessionRecord:
        raise StoreError("It was read.")

    async def read_path(self, session_id: str, turn_id: str, *, bytes_max: int | None) -> Sequence[TurnRecord]:
        raise StoreError("It was read.")


async def test_the_first_turn_of_a_new_session_starts_with_one_step_of_the_store(autojump_clock: MockClock) -> None:
    async with open_stage(OneStep()) as stage:
        turn, watch = await stage.sessions.start_turn("me", msgspec.structs.replace(CHAT, session_is_new=True))
        with watch:
            reply = await stage.puppet.next_reply()
            assert [item.text for item in reply.request.prompt] == ["hi"]
            reply.finish()
            assert (await turn.wait_ended()).state == "completed"


@pytest.mark.parametrize("kind", [MemoryStore, LeavesPathsOut])
async def test_the_prompt_is_the_same_from_the_acceptance_and_from_a_read(
    autojump_clock: MockClock, kind: type[MemoryStore]
) -> None:
    async with open_stage(kind(), prompt_bytes_max=3500, input_bytes_max=1024) as stage:
        session = await stage.sessions.create_session(NewSession(system_message="Be brief."))
        for number in range(3):
            turn = await start(stage.sessions, session.id, f"{number}" * 1000)
            reply = await stage.puppet.next_reply()
            reply.say("R")
            reply.finish()
            await turn.wait_ended()
        turn = await start(stage.sessions, session.id, "3" * 1000)
        reply = await stage.puppet.next_reply()
        reply.finish()
        await turn.wait_ended()
    assert [(item.role, item.text[:1], len(item.text)) for item in reply.request.prompt] == [
        *(("system", "B", 9), ("user", "1", 1000), ("assistant", "R", 1), ("user", "2", 1000)),
        *(("assistant", "R", 1), ("user", "3", 1000)),
    ]
    assert turn.record().left_out == LeftOut(2, 1001)


async def test_turn_without_a_model_takes_the_first_of_the_upstreams(autojump_clock: MockClock) -> None:
    upstreams = [{"name": "local", "url": "http://127.0.0.1:1/v1", "models": ["small", "large"]}]
    async with open_stage(upstreams=upstreams) as stage:
        await stage.sessions.create_session(NewSession(id="s"))
        assert (await start(stage.sessions, "s")).record().model == "small"


class HeadMoves(MemoryStore):
    """Another process has a turn each time between the look at the head and the acceptance, so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.between = [f"between-{n}" for n in range(times)]
        self.last: str | None = None

    async def begin_turn(self, turn: TurnRecord, **rest: Any) -> BegunTurn:
        if self.between:
            theirs = a_turn(self.between.pop(0), turn.session_id, parent=self.last)
            self.last = theirs.id
            await super().begin_turn(theirs, now=rest["now"])
            await super().end_turn(ended(theirs), runs=(), now=rest["now"])
        return await super().begin_turn(turn, **rest)


@pytest.mark.parametrize("times", [1, 5])
async def test_a_turn_follows_on_those_that_others_had_meanwhile(autojump_clock: MockClock, times: int) -> None:
    store = HeadMoves(times)
    async with open_stage(store) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn = await start(stage.sessions, session.id)
        reply = await stage.puppet.next_reply()
        assert [message.role for message in reply.request.prompt] == ["user", "assistant"] * times + ["user"]
        reply.finish()
        record = await turn.wait_ended()
    assert record.parent == f"between-{times - 1}"


async def test_a_branch_keeps_its_parent_when_the_head_moves(autojump_clock: MockClock) -> None:
    store = HeadMoves(1)
    async with open_stage(store) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="hi", parent=None))
        watch.release()
        assert (await turn.wait_ended()).parent is None
