"""Wall time, for timestamps that are stored or shown.

Deadlines of running code never use it: those are ``trio.current_time()``. One clock is made in
:func:`service.supervisor.open_service` and handed down, so a test replaces it in one place.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog

logger = structlog.get_logger("lastcall.clock")

Clock = Callable[[], datetime]
"""Gives the present moment as an aware datetime in UTC."""

FOLLOWED_S = 10.0
"""A step of the wall clock up to this is followed at once: time daemons and leap seconds make such steps."""
BELIEVED_AFTER_S = 900.0
"""A larger step is believed when it has held for so long. A time daemon that was led astray asks its servers again
within that time; ntpd itself waits as long, or less, before it believes a step of its servers."""
BELIEVED_AFTER_MIN_S = 60.0
"""The same for a process that has just been started."""

_MICROSECOND = timedelta(microseconds=1)


def wall_clock() -> datetime:
    """The machine's own clock, in UTC."""
    return datetime.now(UTC)


def elapsed_s() -> float:
    """Seconds that have passed for the machine, those in which it was suspended included; nobody can set it."""
    return time.clock_gettime(_ELAPSED)


_ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SteadyClock:
    """The wall clock, as long as the time that has really passed confirms it.

    A step of the wall clock that is larger than :data:`FOLLOWED_S` is not followed: time goes on from where it was. If
    the wall clock comes back nothing has happened. If it stays it is believed: after :data:`BELIEVED_AFTER_S`, or
    sooner where the new time has held for as long as the time before it, but not before
    :data:`BELIEVED_AFTER_MIN_S`. So a process that was started with a wrong clock is right again soon after the clock
    is.

    Each moment is later than the one before, by a microsecond at least: what is created later is newer. Only where a
    step back is believed the next moment is earlier.

    Each process judges for itself. Those that share a store agree as far as they have been there for as long.

    Args:
        wall: The clock that may be set.
        elapsed_s: Seconds that have passed, from any beginning.
    """

    def __init__(self, wall: Clock = wall_clock, elapsed_s: Callable[[], float] = elapsed_s) -> None:
        self._wall = wall
        self._elapsed_s = elapsed_s
        self._since = self._seen_at = elapsed_s()
        self._believed = self._last = wall()
        """The time at ``_seen_at``, of a wall clock that has not been set since ``_since``."""
        self._doubt: _Doubt | None = None

    @property
    def in_doubt(self) -> bool:
        """Whether the wall clock tells another time, and which of the two is right is open. As of the last call."""
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
                logger.warning("the wall clock is back")
            self._believed, self._seen_at = wall, elapsed_s
            return wall
        doubt = self._doubt
        if doubt is None or abs(off_s - doubt.off_s) > FOLLOWED_S:
            doubt = self._doubt = _Doubt(off_s, elapsed_s)
            logger.warning(
                "the wall clock was set, unlike the time that has passed; the time before goes on, nothing is removed",
                off_s=round(off_s, 3),
                believed_after_s=round(self._believed_after_s(doubt)),
            )
        if elapsed_s - doubt.since >= self._believed_after_s(doubt):
            logger.warning("the wall clock was set for good; going on from there", off_s=round(off_s, 3))
            self._doubt, self._since = None, doubt.since
            self._believed, self._seen_at = wall, elapsed_s
            self._last = min(self._last, wall - _MICROSECOND)
            return wall
        return steady

    def _believed_after_s(self, doubt: "_Doubt") -> float:
        return max(BELIEVED_AFTER_MIN_S, min(BELIEVED_AFTER_S, doubt.since - self._since))


class _Doubt:
    """A time that the wall clock tells beside the one that is believed: by how much it is off, and since when."""

    def __init__(self, off_s: float, since: float) -> None:
        self.off_s = off_s
        self.since = since


def is_in_doubt(clock: Clock) -> bool:
    """Whether what a clock told last is in doubt: never, with one that does not judge."""
    return isinstance(clock, SteadyClock) and clock.in_doubt
