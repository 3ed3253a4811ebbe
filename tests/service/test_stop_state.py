"""The phase of a stop: it only goes forward, and code waits for it without polling."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from service.settings import Settings
from service.shutdown import Shutdown
from service.stop_state import Phase, StopState


async def test_the_phase_never_goes_back() -> None:
    stop = StopState()
    stop.enter(Phase.CLOSING)
    stop.enter(Phase.LAME_DUCK)
    stop.expect_notice(lambda: None)
    assert stop.phase is Phase.CLOSING


async def test_a_phase_that_is_skipped_has_the_time_of_the_next_one(autojump_clock: MockClock) -> None:
    stop = StopState()
    await trio.sleep(1)
    stop.enter(Phase.LAME_DUCK)
    await trio.sleep(2)
    stop.enter(Phase.CLOSING)
    assert stop.entered_at == {Phase.EXPECTED: 1, Phase.LAME_DUCK: 1, Phase.DRAINING: 3, Phase.CLOSING: 3}


async def test_who_waits_for_a_phase_goes_on_at_a_later_one_too(autojump_clock: MockClock) -> None:
    stop = StopState()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop.reached, Phase.DRAINING)
        stop.enter(Phase.LAME_DUCK)
        await wait_all_tasks_blocked()
        assert nursery.child_tasks
        stop.enter(Phase.RELEASED)
    await stop.reached(Phase.RELEASED)


@pytest.mark.parametrize("phase", [Phase.CLOSING, Phase.RELEASED])
async def test_a_wait_until_a_phase_ends_with_that_phase_or_its_deadline(
    autojump_clock: MockClock, phase: Phase
) -> None:
    stop = StopState()
    with stop.until(Phase.CLOSING, deadline=5):
        await trio.sleep_forever()
    assert trio.current_time() == 5
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_enter_at, stop, 7, phase)
        with stop.until(Phase.CLOSING, deadline=10):
            await trio.sleep_forever()
        assert trio.current_time() == 7
    with stop.until(Phase.CLOSING):
        await trio.sleep_forever()
    assert trio.current_time() == 7


async def _enter_at(stop: StopState, seconds: float, phase: Phase) -> None:
    stop.enter(Phase.DRAINING)
    await trio.sleep_until(seconds)
    stop.enter(phase)


async def test_a_notice_that_a_thread_has_seen_is_expected_until_it_arrives() -> None:
    shutdown = Shutdown(Settings(lame_duck_timeout_s=1))
    await trio.to_thread.run_sync(shutdown.expect_notice, lambda: None)
    seen = [shutdown.phase]
    assert shutdown.entered_at == {}, "no task goes on before the notice arrives"
    shutdown.notice("SIGTERM")
    seen.append(shutdown.phase)
    await trio.to_thread.run_sync(shutdown.expect_notice, lambda: None)
    assert [*seen, shutdown.phase] == [Phase.EXPECTED, Phase.LAME_DUCK, Phase.LAME_DUCK]


async def test_a_first_notice_is_the_one_that_streams_have_arrive() -> None:
    stop = StopState(interrupts_at_once=True)
    arrived: list[str] = []
    assert not stop.ends_only()
    for reason in ("first", "second"):
        stop.expect_notice(lambda reason=reason: arrived.append(reason))  # type: ignore[misc]
    assert stop.ends_only()
    assert arrived == ["first"]


async def test_the_report_tells_how_long_the_notice_took(autojump_clock: MockClock) -> None:
    shutdown = Shutdown(Settings())
    shutdown.notice("SIGTERM", age_s=0.0204)
    await trio.sleep(1)
    phases_ms = shutdown.report(tasks_left=0).phases_ms
    assert phases_ms == {"notice": 20.4, "lame_duck": 0, "draining": 1000, "total": 1020.4}
