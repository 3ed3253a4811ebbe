"""Deadlines that lag behind: Trio hears of them late, and they pass at the time that is true."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import inf

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import MockClock

from service.freezes import THAW_S, watch_for_freezes
from service.lagging_deadlines import DeadlineMover, lagging
from service.sessions.events.outcome import Outcome
from service.sessions.turns.turn_deadlines import TurnDeadlines

Step = Callable[[TurnDeadlines], None]


def a_token(within_s: float) -> Step:
    return lambda deadlines: deadlines.expect_token("next_token_timeout", within_s=within_s)


def no_client(within_s: float) -> Step:
    return lambda deadlines: deadlines.note_no_client(returns_within_s=within_s)


def a_client(deadlines: TurnDeadlines) -> None:
    deadlines.note_client()


def stopped(deadlines: TurnDeadlines) -> None:
    deadlines.stop()


seconds = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
steps = st.builds(a_token, seconds) | st.builds(no_client, seconds) | st.just(a_client) | st.just(stopped)


def ends(work: list[tuple[float, Step]], enter: Callable[[TurnDeadlines], AbstractContextManager[trio.CancelScope]]):  # type: ignore[no-untyped-def]
    """When and how work ends that takes these steps, each after a pause."""

    async def run() -> tuple[float, bool, Outcome]:
        deadlines = TurnDeadlines()
        began_at = trio.current_time()
        deadlines.start(9)
        deadlines.expect_token("first_token_timeout", within_s=4)
        with enter(deadlines):
            for pause_s, step in work:
                await trio.sleep(pause_s)
                step(deadlines)
            await trio.sleep_forever()
        return trio.current_time() - began_at, deadlines.have_stopped(), deadlines.end()

    return trio.run(run, clock=MockClock(autojump_threshold=0))


@given(st.lists(st.tuples(seconds, steps), max_size=10))
@example([(0.0, a_token(5)), (0.0, a_token(0.5))])
def test_work_ends_when_and_as_it_does_where_trio_hears_of_each_move(work: list[tuple[float, Step]]) -> None:
    assert ends(work, TurnDeadlines.at_work) == ends(work, lambda deadlines: deadlines.scope)


async def test_tokens_leave_the_deadline_that_trio_knows_as_it_is(autojump_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    deadlines.start(600)
    armed: list[float] = []
    with deadlines.at_work():
        for _ in range(25):
            deadlines.expect_token("next_token_timeout", within_s=10)
            armed.append(deadlines.scope.deadline)
            await trio.sleep(1)
        await trio.sleep_forever()
    assert sorted(set(armed)) == [10, 18, 26], "moved two seconds before its time, to the time that is true by then"
    assert trio.current_time() == 34


async def test_a_token_after_the_deadline_is_too_late_also_before_trio_has_looked(mock_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    with deadlines.at_work() as scope:
        for _ in range(2):
            deadlines.expect_token("next_token_timeout", within_s=10)
        mock_clock.jump(11)
        deadlines.expect_token("next_token_timeout", within_s=10)
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_the_time_that_trio_knows_stops_nothing_where_a_token_has_moved_it(mock_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    with deadlines.at_work() as scope:
        deadlines.expect_token("next_token_timeout", within_s=10)
        mock_clock.jump(5)
        deadlines.expect_token("next_token_timeout", within_s=10)
        mock_clock.jump(7)
        assert not deadlines.have_stopped()
        deadlines.expect_token("next_token_timeout", within_s=10)
        mock_clock.jump(9)
        await trio.lowlevel.checkpoint()
    assert not scope.cancelled_caught


class ClockThatMovesOn(trio.abc.Clock):
    """Each look at it is later than the one before, by ``step_s``."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._now = 0.0

    def start_clock(self) -> None: ...

    def current_time(self) -> float:
        self._now += self._step_s
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return 0


@pytest.mark.parametrize("step_s", [0.0001, 0.003, 0.01, 0.02, 0.07])
def test_no_look_at_the_clock_falls_between_the_one_of_the_mover_and_the_one_of_trio(step_s: float) -> None:
    """The tokens come long before the true deadline, also while the one that Trio knows passes."""

    async def run() -> float:
        clock = trio.lowlevel.current_clock()
        deadlines = TurnDeadlines()
        with deadlines.at_work() as scope:
            while clock.current_time() < 12 and not scope.cancel_called:
                deadlines.expect_token("next_token_timeout", within_s=4)
                for _ in range(5):
                    await trio.lowlevel.checkpoint()
        return clock.current_time()

    assert trio.run(run, clock=ClockThatMovesOn(step_s)) >= 12


async def test_after_a_stop_a_token_sets_nothing(mock_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    with deadlines.at_work():
        deadlines.expect_token("next_token_timeout", within_s=10)
        deadlines.stop()
        deadlines.expect_token("next_token_timeout", within_s=20)
    assert "silence at 10" in repr(deadlines)


async def test_one_look_a_second_serves_all_deadlines(autojump_clock: MockClock) -> None:
    looks: list[float] = []

    class Moving:
        def __init__(self) -> None:
            self.armed_at = inf

        def catch_up(self) -> None:
            looks.append(trio.current_time())
            self.armed_at = trio.current_time() + 60

    deadlines = [Moving() for _ in range(100)]
    with lagging(deadlines[0]) as mover:
        for at, deadline in enumerate(deadlines):
            mover.add(deadline)
            deadline.armed_at = 10 + at / 50
            mover.note_armed(deadline.armed_at)
        for _ in range(400):
            await trio.sleep(0.05)
        for deadline in deadlines[1:]:
            mover.discard(deadline)
    assert len(looks) == 100
    assert len(set(looks)) <= 3
    assert mover._lagging == {}


async def test_after_a_freeze_a_lagging_deadline_leaves_time_to_read(mock_clock: MockClock) -> None:
    frozen_s = 0.0
    deadlines = TurnDeadlines()
    with watch_for_freezes(clock=trio.current_time, cpu_clock=lambda: frozen_s), deadlines.at_work():
        deadlines.expect_token("next_token_timeout", within_s=10)
        deadlines.expect_token("next_token_timeout", within_s=10)
        mock_clock.jump(4)
        deadlines.expect_token("next_token_timeout", within_s=10)
        mock_clock.jump(100)
        await trio.lowlevel.checkpoint()
        assert not deadlines.have_stopped()
        assert deadlines.scope.deadline == pytest.approx(104 + THAW_S)


def test_an_event_loop_has_a_mover_of_its_own() -> None:
    async def run() -> DeadlineMover:
        with lagging(TurnDeadlines()) as first, lagging(TurnDeadlines()) as second:
            assert first is second
        return first

    assert trio.run(run) is not trio.run(run)
