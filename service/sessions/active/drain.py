"""The stop, as sessions see it: nothing new, then no more turns. When what comes is up to :mod:`service.shutdown`."""

from collections.abc import Callable
from typing import Literal

from service.cluster.proxied_requests import ProxiedRequests
from service.errors import ShuttingDownError
from service.sessions.active.active_sessions import ActiveSessions
from service.sessions.events import outcome
from service.sessions.events.streams import Streams
from service.sessions.turns.turn import Turn


class Drain:
    """How far the stop has come. Only ever goes on; all but the wait is synchronous."""

    def __init__(self, active: ActiveSessions, streams: Streams, proxied_requests: ProxiedRequests) -> None:
        self._active = active
        self._streams = streams
        self._proxied_requests = proxied_requests
        self._accepting = True
        self._interrupting: Literal["none", "queued", "all"] = "none"

    def stop_accepting(self) -> None:
        """From now on new sessions and turns are refused with ShuttingDownError."""
        self._accepting = False

    def check_accepting(self) -> None:
        """Raises: ShuttingDownError, where nothing new is accepted."""
        if not self._accepting:
            raise ShuttingDownError

    def end_streams_only(self, then: Callable[[], None]) -> None:
        """All turns are about to be interrupted: streams write nothing more before their ends. From any thread.

        ``then`` is called by the first stream that comes to know it, in the event loop.
        """
        self._streams.hold(then)

    def interrupt_queued(self) -> int:
        """End queued turns as ``interrupted``, and those that would be queued yet; how many there were."""
        if self._interrupting == "none":
            self._interrupting = "queued"
        return sum(
            turn.cut_short(outcome.Interrupted("shutdown")) for turn in self._active.open_turns() if not turn.running
        )

    def interrupt_all(self) -> int:
        """End all open turns as ``interrupted``, and those on their way; how many there were.

        Turns of other processes go on, but not through this one: their streams end with ``cleanup_timeout_s``, in which
        those see their terminal events whose process stops as well.
        """
        self._interrupting = "all"
        self._proxied_requests.leave()
        return sum(turn.cut_short(outcome.Interrupted("shutdown")) for turn in self._active.open_turns())

    def interrupt_late(self, turn: Turn) -> None:
        """Have a turn that was on its way share the lot of those before it."""
        if self._interrupting == "all" or (self._interrupting == "queued" and not turn.running):
            turn.cut_short(outcome.Interrupted("shutdown"))

    async def wait_idle(self) -> None:
        """Return once no turn is open, no end is being stored, no deletion is under way and nothing is passed on.

        At once and without a checkpoint, if that is so.
        """
        while not (self._active.is_idle and self._proxied_requests.is_idle):
            await self._active.wait_idle()
            await self._proxied_requests.wait_idle()
