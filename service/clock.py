"""Wall time, for timestamps that are stored or shown.

Deadlines of running code never use it: those are ``trio.current_time()``. One clock is made in
:func:`service.supervisor.open_service` and handed down, so a test replaces it in one place.
"""

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Gives the present moment as an aware datetime in UTC."""


def wall_clock() -> datetime:
    """The machine's own clock, in UTC."""
    return datetime.now(UTC)
