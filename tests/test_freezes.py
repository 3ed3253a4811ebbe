"""Deadlines of a process that was frozen. A jump of the clock stands for the freeze: nothing runs meanwhile."""

import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from math import ceil, inf

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from service.errors import StoreError
from service.freezes import (
    LATE_S,
    READING_S,
    THAW_S,
    Deadline,
    Lateness,
    calling_when_late,
    check_for_freeze,
    move_on_after,
    watch_for_freezes,
)
from service.sessions.commands import NewSession, NewTurn
from service.sessions.events.streams import Streams
from service.sessions.turns.turn import Turn
from service.sessions.upkeep.heartbeats import run_heartbeats
from service.stop_state import StopState
from service.storage.store_deadline import answered_within
from tests.sessions.puppet import LeavesPathsOut, Stage, open_stage

STEP_S = LATE_S * 0.8


class CpuClock:
    """A clock of this thread's processor time, which a test sets."""

    def __init__(self) -> None:
        self.ran_s = 0.0

    def __call__(self) -> float:
        return self.ran_s


@pytest.fixture
def cpu() -> CpuClock:
    return CpuClock()


@pytest.fixture
async def watched(cpu: CpuClock) -> AsyncIterator[None]:
    """The event loop is watched, by a clock that only the test moves: the test must use ``mock_clock`` too."""
    with watch_for_freezes(clock=trio.current_time, cpu_clock=cpu):
        yield


async def _start(stage: Stage, **new: object) -> Turn:
    session = await stage.sessions.create_session(NewSession())
    turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="hi", background=True, **new))  # type: ignore[arg-type]
    watch.release()
    return turn


async def _pass(clock: MockClock, seconds: float) -> None:
    """Let time pass while the event loop is never late."""
    for _ in range(ceil(seconds / STEP_S)):
        clock.jump(STEP_S)
        await wait_all_tasks_blocked()


# Turns


@pytest.mark.parametrize("frozen_s", [10, 1000])
@pytest.mark.parametrize("first", [True, False])
async def test_tokens_that_came_in_a_freeze_are_read_before_a_deadline_fails_the_turn(
    watched: None, mock_clock: MockClock, first: bool, frozen_s: float
) -> None:
    async with open_stage(first_token_timeout_s=5, next_token_timeout_s=5, turn_timeout_s=50) as stage:
        turn = await _start(stage)
        reply = await stage.puppet.next_reply()
        if not first:
            reply.say("a")
            await wait_all_tasks_blocked()
        reply.say("b")  # the token is not read yet when the clock jumps
        mock_clock.jump(frozen_s)
        await wait_all_tasks_blocked()
        assert turn.end is None
        reply.say("c")
        reply.finish()
        ended = await turn.wait_ended()
        assert (ended.state, ended.text) == ("completed", "bc" if first else "abc")


@pytest.mark.parametrize("timeout_s", [2, 60])
async def test_a_model_that_sends_nothing_after_a_freeze_either_fails_its_turn(
    watched: None, mock_clock: MockClock, timeout_s: float
) -> None:
    async with open_stage(first_token_timeout_s=timeout_s, turn_timeout_s=3600) as stage:
        turn = await _start(stage)
        await stage.puppet.next_reply()
        mock_clock.jump(1000)
        left_s = min(timeout_s, THAW_S)
        await wait_all_tasks_blocked()
        await _pass(mock_clock, left_s - 0.5)
        assert turn.end is None
        await _pass(mock_clock, 0.6)
        ended = await turn.wait_ended()
        assert ended.error is not None
        assert ended.error.code == "first_token_timeout"


async def test_a_whole_turn_leaves_time_to_read_what_came_in_a_freeze_and_no_more(
    watched: None, mock_clock: MockClock
) -> None:
    async with open_stage(turn_timeout_s=10, next_token_timeout_s=1000) as stage:
        turn = await _start(stage)
        reply = await stage.puppet.next_reply()
        reply.say("a")
        await wait_all_tasks_blocked()
        mock_clock.jump(60)
        await wait_all_tasks_blocked()
        for _ in range(9):
            reply.say("b")
            await _pass(mock_clock, THAW_S / 8)
        ended = await turn.wait_ended()
        assert ended.error is not None
        assert ended.error.code == "turn_timeout"
        assert ended.text == "a" + "b" * 8


async def test_a_freeze_in_the_middle_of_a_round_of_the_event_loop_is_seen(
    watched: None, mock_clock: MockClock
) -> None:
    class Freezing(LeavesPathsOut):
        async def read_path(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            path = await super().read_path(*args, **kwargs)  # type: ignore[arg-type]
            mock_clock.jump(500)  # next, the turn checks its deadlines
            return path

    async with open_stage(Freezing(), turn_timeout_s=10) as stage:
        turn = await _start(stage)
        reply = await stage.puppet.next_reply()
        reply.finish()
        assert (await turn.wait_ended()).state == "completed"


async def test_a_client_that_comes_back_after_a_freeze_finds_its_turn(watched: None, mock_clock: MockClock) -> None:
    async with open_stage(disconnect_grace_s=3) as stage:
        session = await stage.sessions.create_session(NewSession())
        turn, watch = await stage.sessions.start_turn(session.id, NewTurn(text="hi"))
        reply = await stage.puppet.next_reply()
        watch.release()
        mock_clock.jump(1000)
        await wait_all_tasks_blocked()
        _, again = await stage.sessions.open_events(session.id, turn.id)
        reply.finish()
        assert (await turn.wait_ended()).state == "completed"
        again.release()


async def test_a_turn_that_was_cancelled_before_a_freeze_says_why(watched: None, mock_clock: MockClock) -> None:
    async with open_stage(first_token_timeout_s=5) as stage:
        stage.puppet.close_s = 1
        turn = await _start(stage)
        await stage.puppet.next_reply()
        await _pass(mock_clock, 5.1)
        mock_clock.jump(1000)  # the stream is still closing
        ended = await turn.wait_ended()
        assert ended.error is not None
        assert ended.error.code == "first_token_timeout"
        stage.puppet.close_s = 0


# Others


async def test_the_store_has_time_to_answer_after_a_freeze(watched: None, mock_clock: MockClock) -> None:
    answer = trio.Event()
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            with answered_within(5):
                await answer.wait()

        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        mock_clock.jump(1000)
        await wait_all_tasks_blocked()
        await _pass(mock_clock, 4.9)
        answer.set()


async def test_a_store_that_hangs_is_not_waited_for_without_end(watched: None, mock_clock: MockClock) -> None:
    async def be_late(times: int) -> None:
        with answered_within(5):
            for _ in range(times):
                await wait_all_tasks_blocked()
                mock_clock.jump(0.9)
                await trio.lowlevel.checkpoint()

    with pytest.raises(StoreError):
        await be_late(times=8)


async def test_heartbeats_wait_until_what_came_in_a_freeze_is_read(watched: None, mock_clock: MockClock) -> None:
    from service.sessions.events.event_log import EventLog

    streams = Streams(streams_max=10, heartbeat_interval_s=15, stop=StopState())
    log = EventLog(bytes_max=10_000)
    woken = trio.Event()

    async def wait() -> None:
        await streams.open_stream().wait_beyond(log, 0)
        woken.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run_heartbeats, streams)
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        mock_clock.jump(100)
        await wait_all_tasks_blocked()
        assert not woken.is_set()
        await _pass(mock_clock, READING_S + STEP_S)
        assert woken.is_set()
        nursery.cancel_scope.cancel()


# The watch


async def test_in_a_shutdown_a_freeze_counts(mock_clock: MockClock) -> None:
    with watch_for_freezes(counts_frozen_time=lambda: True, clock=trio.current_time, cpu_clock=lambda: 0):
        with move_on_after(10) as scope:
            mock_clock.jump(11)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught


async def test_a_busy_event_loop_leaves_time_for_reading_once(
    watched: None, mock_clock: MockClock, cpu: CpuClock
) -> None:
    def work(seconds: float) -> None:
        cpu.ran_s += seconds
        mock_clock.jump(seconds)

    with move_on_after(10) as scope:
        work(11)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        assert scope.deadline == 11 + READING_S
        work(11)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_the_work_of_moving_deadlines_is_no_delay_that_moves_them_again(
    watched: None, mock_clock: MockClock, cpu: CpuClock
) -> None:
    """With thousands of turns that work takes longer than LATE_S: each round would follow from the one before."""
    calls: list[Lateness] = []

    def on_late(lateness: Lateness) -> None:
        calls.append(lateness)
        cpu.ran_s += 2 * LATE_S
        mock_clock.jump(2 * LATE_S)

    with calling_when_late(on_late):
        mock_clock.jump(2 * LATE_S)
        for _ in range(5):
            await trio.lowlevel.checkpoint()
    assert len(calls) == 1


async def test_a_late_round_leaves_deadlines_that_are_far_away(watched: None, mock_clock: MockClock) -> None:
    with move_on_after(1000) as scope:
        mock_clock.jump(60)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        assert scope.deadline == 1000


async def test_without_a_watch_deadlines_are_as_they_are(mock_clock: MockClock) -> None:
    with move_on_after(10) as scope:
        check_for_freeze()
        mock_clock.jump(11)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


@given(
    st.floats(0, 1e6) | st.just(inf),
    st.floats(0, 1e6),
    st.floats(0.1, 1e4) | st.just(inf),
    st.booleans(),
    st.booleans(),
)
def test_a_deadline_only_moves_away_and_never_further_than_it_was_at_first(
    at: float, now: float, timeout_s: float, was_frozen: bool, is_second: bool
) -> None:
    deadline = Deadline(at, timeout_s=timeout_s)
    if is_second:
        deadline.note_late(Lateness(now - 1, was_frozen))
    before = deadline.at
    deadline.note_late(Lateness(now, was_frozen))
    assert deadline.at >= before
    assert deadline.at in (before, now + min(THAW_S if was_frozen else READING_S, timeout_s))


@contextmanager
def _bytes_on_their_way() -> Iterator[tuple[socket.socket, trio.SocketStream]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield theirs, trio.SocketStream(trio.socket.from_stdlib_socket(ours))


@pytest.mark.parametrize("is_watched", [True, False])
async def test_trio_looks_at_deadlines_before_anybody_can_read(is_watched: bool) -> None:
    """By the real clock. The case without the watch fails once Trio reads first; then no watch is needed."""
    read = b""
    with _bytes_on_their_way() as (theirs, stream):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                nonlocal read
                with move_on_after(0.1):
                    await trio.lowlevel.wait_readable(stream.socket)
                    await trio.lowlevel.checkpoint()  # every layer above a socket has checkpoints
                    read = await stream.receive_some()

            async def block() -> None:
                await wait_all_tasks_blocked()
                theirs.send(b"here")
                time.sleep(0.3)  # noqa: ASYNC251  the freeze

            if is_watched:
                with watch_for_freezes():
                    async with trio.open_nursery() as inner:
                        inner.start_soon(receive)
                        inner.start_soon(block)
            else:
                nursery.start_soon(receive)
                nursery.start_soon(block)
    assert read == (b"here" if is_watched else b"")


async def test_the_watch_gets_no_call_after_its_end() -> None:
    told: list[Lateness] = []
    with watch_for_freezes(clock=trio.current_time, cpu_clock=lambda: 0), calling_when_late(told.append):
        await trio.lowlevel.checkpoint()
    told.clear()  # the machine may have stood still a moment ago
    time.sleep(0.1)  # noqa: ASYNC251
    await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()
    assert told == []
