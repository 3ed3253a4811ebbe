"""The steps of a stop for sessions: refuse new work, then interrupt turns. :mod:`service.shutdown` says when."""

from collections.abc import Callable
from typing import Literal

from service.cluster.proxied_requests import ProxiedRequests
from service.errors import ShuttingDownError
from service.sessions.active.active_sessions import ActiveSessions
from service.sessions.events import outcome
from service.sessions.events.streams import Streams
from service.sessions.turns.turn import Turn


class Drain:
    """The progress of the stop. Never goes back; all methods except :meth:`wait_idle` are synchronous."""

    def __init__(self, active: ActiveSessions, streams: Streams, proxied_requests: ProxiedRequests) -> None:
        self._active = active
        self._streams = streams
        self._proxied_requests = proxied_requests
        self._accepting = True
        self._interrupting: Literal["none", "queued", "all"] = "none"

    def stop_accepting(self) -> None:
        """Refuse new sessions and turns from now on, with ShuttingDownError."""
        self._accepting = False

    def check_accepting(self) -> None:
        """Raises: ShuttingDownError, if new work is refused."""
        if not self._accepting:
            raise ShuttingDownError

    def end_streams_only(self, then: Callable[[], None]) -> None:
        """Let streams write only their ends, because all turns are about to be interrupted. From any thread.

        The first stream that notices this calls ``then``, in the event loop.
        """
        self._streams.write_ends_only(then)

    def interrupt_queued(self) -> int:
        """End queued turns as ``interrupted``, now and later. Returns the number of turns that end now."""
        if self._interrupting == "none":
            self._interrupting = "queued"
        return sum(
            turn.cut_short(outcome.Interrupted("shutdown")) for turn in self._active.open_turns() if not turn.running
        )

    def interrupt_all(self) -> int:
        """End all open turns as ``interrupted``, now and later. Returns the number of turns that end now.

        Turns of other processes go on, but their streams through this process end after ``cleanup_timeout_s``. If the
        owner of such a turn stops as well, its terminal event arrives within that time.
        """
        self._interrupting = "all"
        self._proxied_requests.end_soon()
        return sum(turn.cut_short(outcome.Interrupted("shutdown")) for turn in self._active.open_turns())

    def interrupt_late(self, turn: Turn) -> None:
        """Interrupt a turn that was being accepted when :meth:`interrupt_queued` or :meth:`interrupt_all` ran."""
        if self._interrupting == "all" or (self._interrupting == "queued" and not turn.running):
            turn.cut_short(outcome.Interrupted("shutdown"))

    async def wait_idle(self) -> None:
        """Wait until no turn is open, no end is being stored, no deletion is under way and no request is proxied.

        Returns without a checkpoint if all of this is true already.
        """
        while not (self._active.is_idle and self._proxied_requests.is_idle):
            await self._active.wait_idle()
            await self._proxied_requests.wait_idle()
