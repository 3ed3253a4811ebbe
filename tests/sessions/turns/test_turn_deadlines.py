"""The deadlines of a turn by themselves: which one stops the work, and what its end says."""

from collections.abc import Callable
from itertools import permutations
from math import inf

import pytest
import trio
from trio.testing import MockClock

from service.freezes import READING_S, THAW_S, Lateness
from service.lagging_deadlines import lagging
from service.sessions.events.outcome import Cancelled, Failed, Outcome
from service.sessions.turns.turn_deadlines import TurnDeadlines

CAP_S = 1000.0

SETTERS: dict[str, Callable[[TurnDeadlines, float], None]] = {
    "turn_timeout": lambda deadlines, within_s: deadlines.start(within_s),
    "disconnected": lambda deadlines, within_s: deadlines.note_no_client(returns_within_s=within_s),
    "first_token_timeout": lambda deadlines, within_s: deadlines.expect_token("first_token_timeout", within_s=within_s),
}


def code_of(end: Outcome) -> str:
    match end:
        case Cancelled(reason):
            return reason
        case Failed(error):
            return error.code
        case _:
            raise AssertionError(end)


async def work(deadlines: TurnDeadlines) -> float:
    """Work until a deadline stops it. Returns how long that took."""
    began_at = trio.current_time()
    with trio.fail_after(CAP_S), deadlines.at_work():
        await trio.sleep_forever()
    assert deadlines.have_stopped()
    return trio.current_time() - began_at


@pytest.mark.parametrize("order", list(permutations(SETTERS)), ids="-".join)
async def test_the_first_deadline_stops_the_work_and_tells_the_end(
    autojump_clock: MockClock, order: tuple[str, ...]
) -> None:
    for set_in in permutations(order):
        deadlines = TurnDeadlines()
        for name in set_in:
            SETTERS[name](deadlines, 7.0 * (1 + order.index(name)))
        assert await work(deadlines) == 7
        assert code_of(deadlines.end()) == order[0]


async def test_an_end_says_the_time_that_was_over(autojump_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    deadlines.start(600)
    deadlines.expect_token("first_token_timeout", within_s=60)
    deadlines.expect_token("next_token_timeout", within_s=2.5)
    assert await work(deadlines) == 2.5
    end = deadlines.end()
    assert isinstance(end, Failed)
    assert (end.error.code, end.error.message) == (
        "next_token_timeout",
        "The model server sent nothing for 2.5 s (next_token_timeout_s).",
    )


async def test_a_deadline_that_has_passed_is_not_set_anew(autojump_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    deadlines.expect_token("first_token_timeout", within_s=1)
    await trio.sleep(1)
    deadlines.start(0.5)
    deadlines.expect_token("next_token_timeout", within_s=inf)
    deadlines.note_no_client(returns_within_s=0.1)
    deadlines.note_client()
    assert await work(deadlines) == 0
    assert code_of(deadlines.end()) == "first_token_timeout"


async def test_a_client_that_comes_back_takes_its_deadline_away(autojump_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    deadlines.start(9)
    deadlines.note_no_client(returns_within_s=1)
    deadlines.note_client()
    assert await work(deadlines) == 9
    assert code_of(deadlines.end()) == "turn_timeout"


async def test_work_that_is_stopped_otherwise_stops_at_once_and_sets_no_deadline(autojump_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    deadlines.start(9)
    deadlines.stop()
    deadlines.start(0)
    assert deadlines.have_stopped()
    assert await work(deadlines) == 0


@pytest.mark.parametrize(("was_frozen", "left_s"), [(True, THAW_S), (False, READING_S)])
@pytest.mark.parametrize("order", list(permutations(SETTERS)), ids="-".join)
async def test_deadlines_that_a_delay_moves_to_one_moment_keep_their_order(
    mock_clock: MockClock, order: tuple[str, ...], *, was_frozen: bool, left_s: float
) -> None:
    deadlines = TurnDeadlines()
    for name in sorted(SETTERS):
        SETTERS[name](deadlines, 20.0 + order.index(name))
    mock_clock.jump(30)
    deadlines.note_late(Lateness(trio.current_time(), was_frozen))
    assert not deadlines.have_stopped()
    mock_clock.autojump_threshold = 0
    assert await work(deadlines) == left_s
    assert code_of(deadlines.end()) == order[0]


async def test_a_token_after_a_freeze_leaves_the_order_of_the_other_deadlines(mock_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    deadlines.start(20)
    deadlines.note_no_client(returns_within_s=21)
    deadlines.expect_token("first_token_timeout", within_s=19)
    mock_clock.jump(30)
    deadlines.note_late(Lateness(trio.current_time(), was_frozen=True))
    deadlines.expect_token("next_token_timeout", within_s=60)
    mock_clock.autojump_threshold = 0
    assert await work(deadlines) == THAW_S
    assert code_of(deadlines.end()) == "turn_timeout"


async def test_a_delay_after_the_work_was_stopped_moves_nothing(mock_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    deadlines.start(20)
    before = deadlines.scope.deadline
    deadlines.stop()
    mock_clock.jump(30)
    deadlines.note_late(Lateness(trio.current_time(), was_frozen=True))
    assert deadlines.scope.deadline == before


@pytest.mark.parametrize("was_frozen", [True, False])
async def test_a_delay_touches_no_deadline_that_is_far_away(mock_clock: MockClock, *, was_frozen: bool) -> None:
    deadlines = TurnDeadlines()
    deadlines.start(THAW_S + 20)
    with lagging(deadlines) as mover:
        deadlines.begin_to_lag(mover)
        deadlines.expect_token("next_token_timeout", within_s=THAW_S + 2)
        mock_clock.jump(0.5)
        deadlines.expect_token("next_token_timeout", within_s=THAW_S + 2)
        lags_at = deadlines.scope.deadline
        assert lags_at == THAW_S + 2
        deadlines.note_late(Lateness(trio.current_time(), was_frozen))
        assert deadlines.scope.deadline == lags_at


async def test_a_repr_names_the_deadline_that_passes_first(mock_clock: MockClock) -> None:
    deadlines = TurnDeadlines()
    deadlines.start(20)
    deadlines.expect_token("first_token_timeout", within_s=3)
    assert "silence at 3" in repr(deadlines)
