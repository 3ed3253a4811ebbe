"""What a bound on a server's time leaves out."""

import time
from collections.abc import Iterator

import pytest

from tests import machine
from tests.machine import Machine, held_up_s


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Machine, list[float]]]:
    """A watched machine, and for how long it has held processes up."""
    held = [0.0]
    monkeypatch.setattr(machine, "held_up_s", lambda: held[0])
    watched = Machine()
    yield watched, held
    watched.close()


def test_time_in_which_no_process_was_held_up_counts_whole(watched: tuple[Machine, list[float]]) -> None:
    """So also the time in which a server only sleeps."""
    now = time.monotonic()
    assert watched[0].free_s(now - 0.5, now) == pytest.approx(0.5)


def test_time_in_which_processes_were_held_up_is_left_out(watched: tuple[Machine, list[float]]) -> None:
    since = time.monotonic()
    watched[1][0] = 0.25
    assert watched[0].free_s(since, since + 1) == pytest.approx(0.75)
    assert watched[0].free_s(since, since + 0.1) == 0


def test_the_counters_of_the_kernel_do_not_fall() -> None:
    before = held_up_s()
    assert held_up_s() >= before >= 0
