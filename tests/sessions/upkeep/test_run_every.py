"""The way in which all loops of the upkeep run: the pause, the bound, and what becomes of an error."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from service.errors import StoreError
from service.freezes import LATE_S, READING_S
from service.sessions.events.event_log import EventLog
from service.sessions.events.streams import Streams
from service.sessions.upkeep.heartbeats import run_heartbeats
from service.sessions.upkeep.run_every import RUN_MAX_S, run_every
from service.stop_state import StopState
from service.storage.standing import Bell


class Runs:
    """What a loop does: notes when each run begins, and then does the next of ``deeds``, or nothing."""

    def __init__(self, *deeds: Callable[[], Awaitable[float | None]]) -> None:
        self.begun_at: list[float] = []
        self._deeds = list(deeds)

    async def run(self) -> float | None:
        self.begun_at.append(trio.current_time())
        return await self._deeds.pop(0)() if self._deeds else None


@asynccontextmanager
async def looping(runs: Runs, pause_s: float = 10) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_every, pause_s, runs.run, name="a name"))  # noqa: ASYNC113
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


async def _raise(error: Exception) -> None:
    await trio.lowlevel.checkpoint()
    raise error


async def test_the_pause_is_between_the_end_of_a_run_and_the_next_one(autojump_clock: MockClock) -> None:
    runs = Runs(partial(trio.sleep, 3))
    async with looping(runs):
        assert runs.begun_at == [], "the first run comes after a pause"
        await trio.sleep(35)
    assert runs.begun_at == [10, 23, 33]


async def test_an_error_is_logged_and_the_loop_goes_on(autojump_clock: MockClock) -> None:
    refusal = StoreError("The disk is full.")
    refusal.__cause__ = OSError("ENOSPC")
    runs = Runs(partial(_raise, refusal), partial(_raise, ZeroDivisionError("a fault")))
    with capture_logs() as log:
        async with looping(runs):
            await trio.sleep(35)
    assert runs.begun_at == [10, 20, 30]
    refused, failed = log
    assert refused["loop"] == failed["loop"] == "a name"
    assert (refused["event"], refused["log_level"]) == ("the store refuses; a loop tries again", "warning")
    assert (refused["error"], refused["cause"]) == ("The disk is full.", "OSError: ENOSPC")
    assert (failed["event"], failed["log_level"]) == ("a loop failed; it tries again", "error")
    assert failed["exc_info"]


async def test_a_run_that_hangs_is_ended_and_the_loop_goes_on(autojump_clock: MockClock) -> None:
    runs = Runs(trio.sleep_forever)
    with capture_logs() as log:
        async with looping(runs):
            await trio.sleep(10 + RUN_MAX_S + 15)
    assert runs.begun_at == [10, 10 + RUN_MAX_S + 10]
    assert [line["event"] for line in log] == ["a loop was interrupted, because it took too long; it tries again"]


async def test_a_run_may_say_when_the_next_one_is_due(autojump_clock: MockClock) -> None:
    async def soon() -> float:
        return trio.current_time() + 1

    async def now() -> float:
        return trio.current_time()

    runs = Runs(soon, now, soon)
    async with looping(runs):
        await trio.sleep(25)
    assert runs.begun_at == [10, 11, 11, 12, 22]


@pytest.mark.parametrize("late_s", [0, LATE_S * 2])
async def test_after_a_freeze_there_is_time_to_read_before_the_next_run(mock_clock: MockClock, late_s: float) -> None:
    runs = Runs()
    async with looping(runs):
        mock_clock.jump(10 + late_s)
        mock_clock.autojump_threshold = 0
        await trio.sleep(1)
    assert runs.begun_at == [10 + late_s + (READING_S if late_s else 0)]


@pytest.mark.parametrize("after_s", [5, 15], ids=["in a pause", "in a run"])
async def test_a_cancellation_ends_the_loop(autojump_clock: MockClock, after_s: float) -> None:
    runs = Runs(trio.sleep_forever)
    with trio.move_on_after(after_s) as scope:
        await run_every(10, runs.run, name="a name")
    assert scope.cancelled_caught
    assert trio.current_time() == after_s


async def test_each_silent_stream_is_woken_when_its_own_silence_is_over(autojump_clock: MockClock) -> None:
    streams = Streams(streams_max=10, heartbeat_interval_s=15, stop=StopState())
    woken_at: dict[str, float] = {}

    async def wait(name: str) -> None:
        log = EventLog(bytes_max=10_000)
        await streams.open_stream().wait_beyond(log, 0)
        woken_at[name] = trio.current_time()

    async with trio.open_nursery() as nursery:
        await nursery.start(run_heartbeats, streams)
        for name, pause_s in (("first", 4), ("second", 0), ("third", 7)):
            nursery.start_soon(wait, name)
            await trio.sleep(pause_s)
        nursery.start_soon(wait, "late")
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert woken_at == {"first": 15, "second": 19, "third": 19, "late": 26}


async def test_what_a_loop_is_woken_by_ends_a_pause_and_the_next_one_counts_from_there(
    autojump_clock: MockClock,
) -> None:
    bell = Bell()
    runs = Runs(partial(trio.sleep, 1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_every, 10, runs.run, name="a name", woken=bell.wait))
        await trio.sleep(4)
        bell.ring()
        bell.ring()
        await trio.sleep(0.5)
        bell.ring()  # in a run, which may have passed what has happened now
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert runs.begun_at == [4, 5, 15]
