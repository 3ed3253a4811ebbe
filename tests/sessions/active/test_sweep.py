"""For how long suspended turns wait for their clients."""

from service.sessions.active.sweep import GAP_MAX_S, SUSPENDED_S, Sweep
from service.storage.records import SuspendedSession

RETURNS_S = 30.0
LASTS = SuspendedSession(id="lasts", awaits_client=False)
WAITS = SuspendedSession(id="waits", awaits_client=True)


def _due(sweep: Sweep, now: float, *found: SuspendedSession) -> dict[str, bool]:
    return sweep.due(found, now=now, returns_within_s=RETURNS_S)


def test_a_turn_waits_a_second_and_one_that_needs_its_client_longer_from_the_first_look_on() -> None:
    sweep = Sweep()
    assert (_due(sweep, 100, LASTS, WAITS), sweep.next_due_at) == ({}, 100 + SUSPENDED_S)
    assert (_due(sweep, 100 + SUSPENDED_S, WAITS, LASTS), sweep.next_due_at) == ({"lasts": False}, 100 + RETURNS_S)
    for now in range(103, 130):
        assert _due(sweep, now, WAITS) == {}
    assert _due(sweep, 130, WAITS) == {"waits": True}
    assert sweep.next_due_at is None


def test_a_turn_that_was_adopted_meanwhile_waits_anew() -> None:
    sweep = Sweep()
    _due(sweep, 0, LASTS)
    _due(sweep, 0.5)
    assert _due(sweep, 1, LASTS) == {}
    assert _due(sweep, 1 + SUSPENDED_S, LASTS) == {"lasts": False}


def test_the_time_of_a_freeze_does_not_count() -> None:
    """The process has served no client meanwhile."""
    sweep = Sweep()
    _due(sweep, 0, WAITS)
    assert _due(sweep, 1000, WAITS) == {}
    left_s = RETURNS_S - GAP_MAX_S
    assert sweep.next_due_at == 1000 + left_s
    _due(sweep, 1000 + GAP_MAX_S, WAITS)
    assert _due(sweep, 1000 + left_s, WAITS) == {"waits": True}


def test_a_session_that_is_set_aside_is_not_due_until_its_time_is_over() -> None:
    sweep = Sweep()
    _due(sweep, 0, LASTS, WAITS)
    sweep.set_aside("lasts", until=5)
    assert sweep.known == 2
    assert _due(sweep, 4, LASTS) == {}
    assert sweep.is_set_aside("lasts")
    assert _due(sweep, 5, LASTS) == {"lasts": False}
