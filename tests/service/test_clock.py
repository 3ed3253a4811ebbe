"""A wall clock that is set does no harm: elapsed time counts until it is clear which time is right."""

import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock

from service import clock as clock_module
from service.clock import BELIEVED_AFTER_MIN_S, BELIEVED_AFTER_S, FOLLOWED_S, SteadyClock, elapsed_s, is_in_doubt
from service.errors import SessionNotFoundError
from service.sessions.commands import NewSession
from service.sessions.upkeep.expiry import sweep
from service.settings import Settings
from service.storage.records import SessionPatch
from service.supervisor import Service, open_service

T0 = datetime(2030, 1, 1, tzinfo=UTC)
DAY_S = 86_400.0


class Machine:
    """A machine's clocks: the time that passes, and a wall clock that can be set."""

    def __init__(self, *, off_s: float = 0) -> None:
        self.passed_s = 1000.0
        self.off_s = off_s

    def wall(self) -> datetime:
        return self.true() + timedelta(seconds=self.off_s)

    def true(self) -> datetime:
        return T0 + timedelta(seconds=self.passed_s)

    def elapsed_s(self) -> float:
        return self.passed_s

    def clock(self) -> SteadyClock:
        return SteadyClock(self.wall, self.elapsed_s)


def near(moment: datetime, other: datetime) -> bool:
    return abs(moment - other) < timedelta(seconds=0.001)


@pytest.mark.parametrize("jump_s", [31 * DAY_S, -31 * DAY_S, 60, -60])
def test_a_jump_that_does_not_last_changes_no_moment(jump_s: float) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.passed_s += 3600
    clock()
    with capture_logs() as logged:
        for off_s, doubted in ((jump_s, True), (jump_s, True), (0, False)):
            machine.off_s = off_s
            machine.passed_s += 1
            assert near(clock(), machine.true())
            assert is_in_doubt(clock) == doubted
    assert [line["log_level"] for line in logged] == ["warning", "warning"], "once when it comes, once when it goes"


def test_a_jump_right_after_the_start_is_not_believed_either() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.passed_s += 1
    machine.off_s = 31 * DAY_S
    for _ in range(3):
        machine.passed_s += 1
        assert near(clock(), machine.true())


@pytest.mark.parametrize("jump_s", [31 * DAY_S, -31 * DAY_S])
def test_a_jump_that_lasts_is_believed(jump_s: float) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.passed_s += DAY_S
    machine.off_s = jump_s
    assert near(clock(), machine.true())
    machine.passed_s += BELIEVED_AFTER_S - 1
    assert near(clock(), machine.true())
    machine.passed_s += 1
    assert near(clock(), machine.wall())
    assert not is_in_doubt(clock)


def test_a_jump_that_moves_on_is_another_one() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.passed_s += DAY_S
    for _ in range(10):
        machine.off_s += 60
        machine.passed_s += BELIEVED_AFTER_S / 2
        assert near(clock(), machine.true())
        assert is_in_doubt(clock)


@pytest.mark.parametrize("off_s", [31 * DAY_S, -20_000 * DAY_S])
def test_a_process_that_began_with_a_wrong_clock_is_right_soon_after_the_clock_is(off_s: float) -> None:
    machine = Machine(off_s=off_s)
    clock = machine.clock()
    machine.passed_s += 5
    assert near(clock(), machine.wall()), "the clock cannot know it"
    machine.off_s = 0
    clock()
    assert is_in_doubt(clock), "nothing is removed before it is clear which time is right"
    machine.passed_s += BELIEVED_AFTER_MIN_S
    assert near(clock(), machine.true())
    assert not is_in_doubt(clock)


def test_a_small_step_is_followed_and_no_time_goes_back() -> None:
    machine = Machine()
    clock = machine.clock()
    told = [clock()]
    for off_s in (FOLLOWED_S - 1, 0, -FOLLOWED_S + 1, 0):
        machine.off_s = off_s
        told += [clock(), clock()]
        assert not is_in_doubt(clock)
    assert all(earlier < later for earlier, later in pairwise(told))
    machine.passed_s += 2 * FOLLOWED_S
    assert near(clock(), machine.wall())


def test_a_clock_that_runs_slow_is_followed_however_long() -> None:
    machine = Machine()
    clock = machine.clock()
    for _ in range(10_000):
        machine.passed_s += 300
        machine.off_s -= 0.03  # 100 ppm
        assert near(clock(), machine.wall())
    assert machine.off_s < -200


@given(st.lists(st.tuples(st.floats(0, 400), st.sampled_from([0.0, 0.0, 3.0, -3.0, 1e6, -1e6])), max_size=40))
def test_moments_only_grow_while_no_jump_lasts(steps: list[tuple[float, float]]) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.passed_s += DAY_S
    told = [clock()]
    with capture_logs():
        for wait_s, off_s in steps:
            machine.off_s = off_s
            machine.passed_s += wait_s
            told.append(clock())
            machine.off_s = 0
            told.append(clock())
            assert abs((told[-1] - machine.true()).total_seconds()) <= FOLLOWED_S
    assert all(earlier < later for earlier, later in pairwise(told))


def test_elapsed_time_counts_also_while_the_machine_is_suspended() -> None:
    assert clock_module._ELAPSED == time.CLOCK_BOOTTIME
    assert abs(elapsed_s() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60


# The service


class Running:
    """A service whose machine's time is Trio's."""

    def __init__(self, service: Service, machine: "TrioMachine") -> None:
        self.sessions = service.sessions
        self.store = service.store
        self.machine = machine

    async def is_there(self, session_id: str) -> bool:
        try:
            await self.sessions.get_session(session_id)
        except SessionNotFoundError:
            return False
        return True


class TrioMachine(Machine):
    def true(self) -> datetime:
        return T0 + timedelta(seconds=trio.current_time())

    def elapsed_s(self) -> float:
        return trio.current_time()


SETTINGS = Settings(store_url="memory:", idle_timeout_s=3600, expiry_interval_s=10)


async def test_a_jump_of_31_days_for_a_while_removes_nothing_and_moves_no_deadline(autojump_clock: MockClock) -> None:
    machine = TrioMachine()
    with capture_logs() as logged:
        async with open_service(SETTINGS, clock=machine.clock()) as service:
            running = Running(service, machine)
            await running.sessions.create_session(NewSession(id="before"))
            await trio.sleep(1000)
            machine.off_s = 31 * DAY_S
            for n in range(5):
                await trio.sleep(12)  # a sweep in between
                await running.sessions.create_session(NewSession(id=f"during-{n}"))
                assert await running.is_there("before")
            used = await running.sessions.update_session("before", SessionPatch(title="used"))
            assert near(used.last_accessed_at, machine.true())
            assert near(used.expires_at, machine.true() + timedelta(hours=1))
            machine.off_s = 0
            await trio.sleep(12)
            await running.sessions.create_session(NewSession(id="after"))
            listed = [session.id for session in (await running.sessions.list_sessions(limit=10)).data]
            assert listed == ["after", *(f"during-{n}" for n in reversed(range(5))), "before"]
            await trio.sleep(3600 + 30)
            assert not await running.is_there("before"), "elapsed time counts"
            assert await running.store.count_sessions(status=None, now=T0) == 0, "the session is removed"
    assert [line["event"] for line in logged if line.get("log_level") == "warning"] == [
        "the wall clock was set; sessions still use the time from before, and none of them expires early",
        "the wall clock is at its old time again",
    ]


async def test_a_service_that_began_in_a_jump_removes_nothing_when_the_clock_comes_back(
    autojump_clock: MockClock,
) -> None:
    machine = TrioMachine()
    clock = machine.clock()
    async with open_service(SETTINGS, clock=clock) as service:
        running = Running(service, machine)
        await running.sessions.create_session(NewSession(id="s"))
        machine.off_s = 31 * DAY_S
        service.sessions._clock = began_in_it = machine.clock()  # as a clock of another process would
        await trio.sleep(2)
        assert not await running.is_there("s"), "this clock cannot know it"
        machine.off_s = 0
        assert await sweep(service.store, clock=began_in_it, store_timeout_s=1) == 0
        await trio.sleep(BELIEVED_AFTER_MIN_S)
        assert await running.is_there("s")
        await trio.sleep(100)
        assert await running.store.count_sessions(status=None, now=T0) == 1


async def test_the_service_has_a_clock_that_judges(autojump_clock: MockClock) -> None:
    async with open_service(SETTINGS) as service:
        assert isinstance(service.clock, SteadyClock)
