"""The numbers of the sessions of this process, at one moment."""

from typing import Self

import msgspec

from service.sessions.active.active_sessions import Live
from service.sessions.active.pending_writes import Unkept
from service.sessions.events.streams import Streams


class SessionsStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Ends and streams count since the start."""

    sessions_live: int
    turns_running: int
    turns_queued: int
    turns_completed: int
    turns_failed: int
    turns_cancelled: int
    turns_interrupted: int
    turns_unkept: int
    turns_crashed: int
    streams_open: int
    streams_ended: int
    streams_aborted: int

    @classmethod
    def of(cls, live: Live, unkept: Unkept, streams: Streams) -> Self:
        """The numbers as they are now."""
        running = sum(1 for turn in live.open_turns() if turn.running)
        return cls(
            sessions_live=live.sessions_with_turns,
            turns_running=running,
            turns_queued=live.turns_open - running,
            turns_completed=live.ends["completed"],
            turns_failed=live.ends["failed"],
            turns_cancelled=live.ends["cancelled"],
            turns_interrupted=live.ends["interrupted"],
            turns_unkept=unkept.turns,
            turns_crashed=live.turns_crashed,
            streams_open=streams.open,
            streams_ended=streams.ended,
            streams_aborted=streams.aborted,
        )
