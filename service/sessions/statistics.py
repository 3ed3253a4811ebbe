"""The numbers of the sessions of this process, at one moment."""

from typing import Self

import msgspec

from service.sessions.active.active_sessions import ActiveSessions
from service.sessions.active.pending_writes import PendingWrites
from service.sessions.events.streams import Streams


class TurnsMeasured(msgspec.Struct, frozen=True, kw_only=True):
    """What the open turns are and hold.

    Attributes:
        queued: Turns that do not run yet, and turns that are being accepted.
        log_bytes: The sizes of their logs, as they count against the bound.
    """

    running: int
    queued: int
    log_bytes: int


class SessionsStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Ends and streams count since the start.

    Attributes:
        turns_queued: Open turns that do not run yet, and turns that are being accepted.
        callers_waiting: Callers whose turn, fork or deletion has been asked for and is not done yet.
    """

    sessions_live: int
    turns_running: int
    turns_queued: int
    turns_completed: int
    turns_failed: int
    turns_cancelled: int
    turns_interrupted: int
    turns_suspended: int
    turns_lost: int
    ends_not_stored: int
    turns_crashed: int
    callers_waiting: int
    streams_open: int
    streams_ended: int
    streams_aborted: int

    @classmethod
    def of(
        cls, active: ActiveSessions, pending_writes: PendingWrites, streams: Streams, *, callers_waiting: int
    ) -> Self:
        """The numbers as they are now."""
        running = sum(1 for turn in active.open_turns() if turn.running)
        return cls(
            sessions_live=active.sessions_with_turns,
            turns_running=running,
            turns_queued=active.turns_open - running,
            turns_completed=active.ends["completed"],
            turns_failed=active.ends["failed"],
            turns_cancelled=active.ends["cancelled"],
            turns_interrupted=active.ends["interrupted"],
            turns_suspended=active.turns_suspended,
            turns_lost=active.turns_lost,
            ends_not_stored=pending_writes.turns,
            turns_crashed=active.turns_crashed,
            callers_waiting=callers_waiting,
            streams_open=streams.open,
            streams_ended=streams.ended,
            streams_aborted=streams.aborted,
        )
