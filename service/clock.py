"""Wall time, for timestamps that are stored or shown.

Deadlines of running code use ``trio.current_time()``, never this clock. :func:`service.supervisor.open_service` makes
one clock and passes it down, so a test replaces the clock in one place.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog

logger = structlog.get_logger("lastcall.clock")

Clock = Callable[[], datetime]
"""Gives the present moment as an aware datetime in UTC."""

FOLLOWED_S = 10.0
"""The largest step of the wall clock that is followed at once: time daemons and leap seconds make such steps."""
BELIEVED_AFTER_S = 900.0
"""How long the time after a larger step must hold before the clock believes it. A time daemon with a wrong time asks
its servers again within this time; ntpd itself waits as long, or less, before it believes a step of its servers."""
BELIEVED_AFTER_MIN_S = 60.0
"""The same for a process that has just started."""

_MICROSECOND = timedelta(microseconds=1)


def wall_clock() -> datetime:
    """The machine's own clock, in UTC."""
    return datetime.now(UTC)


def elapsed_s() -> float:
    """Seconds that have passed for the machine, including the time in which it was suspended. Cannot be set."""
    return time.clock_gettime(_ELAPSED)


_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SteadyClock:
    """The wall clock, as long as the time that has really passed confirms it.

    A step of the wall clock that is larger than :data:`FOLLOWED_S` is not followed: this clock goes on from its own
    time. If the wall clock comes back, the step had no effect. If the new time stays, this clock believes it after
    :data:`BELIEVED_AFTER_S`; or sooner, when the new time has held for as long as the time before it, but not before
    :data:`BELIEVED_AFTER_MIN_S`. So a process that started with a wrong clock has the right time soon after the
    machine has it.

    Each moment is later than the moment before, by a microsecond at least, so that records sort by their creation. Only
    when this clock believes a step back, the next moment is earlier.

    Each process judges for itself. Processes that share a store agree if they have run for as long as each other.

    Args:
        wall: The clock that may be set.
        elapsed_s: Seconds that have passed, from any start.
    """

    def __init__(self, wall: Clock = wall_clock, elapsed_s: Callable[[], float] = elapsed_s) -> None:
        self._wall = wall
        self._elapsed_s = elapsed_s
        self._since = self._seen_at = elapsed_s()
        self._believed = self._last = wall()
        """The time at ``_seen_at`` of the wall clock, which has not been set since ``_since``."""
        self._doubt: _Doubt | None = None

    @property
    def in_doubt(self) -> bool:
        """Whether, at the last call, the wall clock differed and this clock did not know yet which time is right."""
        return self._doubt is not None

    def __call__(self) -> datetime:
        elapsed_s, wall = self._elapsed_s(), self._wall()
        now = self._judge(wall, elapsed_s)
        if now <= self._last:
            now = self._last + _MICROSECOND
        self._last = now
        return now

    def _judge(self, wall: datetime, elapsed_s: float) -> datetime:
        steady = self._believed + timedelta(seconds=elapsed_s - self._seen_at)
        off_s = (wall - steady).total_seconds()
        if abs(off_s) <= FOLLOWED_S:
            if self._doubt is not None:
                self._doubt = None
                logger.warning("the wall clock is at its old time again")
            self._believed, self._seen_at = wall, elapsed_s
            return wall
        doubt = self._doubt
        if doubt is None or abs(off_s - doubt.off_s) > FOLLOWED_S:
            doubt = self._doubt = _Doubt(off_s, elapsed_s)
            logger.warning(
                "the wall clock was set; sessions still use the time from before, and none of them expires early",
                off_s=round(off_s, 3),
                believed_after_s=round(self._believed_after_s(doubt)),
            )
        if elapsed_s - doubt.since >= self._believed_after_s(doubt):
            logger.warning("the wall clock has stayed at its new time; sessions use it now", off_s=round(off_s, 3))
            self._doubt, self._since = None, doubt.since
            self._believed, self._seen_at = wall, elapsed_s
            self._last = min(self._last, wall - _MICROSECOND)
            return wall
        return steady

    def _believed_after_s(self, doubt: "_Doubt") -> float:
        return max(BELIEVED_AFTER_MIN_S, min(BELIEVED_AFTER_S, doubt.since - self._since))


class _Doubt:
    """A time of the wall clock that is not believed yet: its distance from the believed time, and since when."""

    def __init__(self, off_s: float, since: float) -> None:
        self.off_s = off_s
        self.since = since


def is_in_doubt(clock: Clock) -> bool:
    """Whether the last time of a clock is in doubt. False for a clock that does not judge its time."""
    return isinstance(clock, SteadyClock) and clock.in_doubt
