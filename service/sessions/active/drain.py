"""The steps of a stop for sessions: refuse new work, then interrupt turns. :mod:`service.shutdown` says when."""

from service.cluster.proxied_requests import ProxiedRequests
from service.errors import ShuttingDownError
from service.sessions.active.active_sessions import ActiveSessions
from service.sessions.events import outcome
from service.sessions.turns.turn import Turn
from service.stop_state import Phase, StopState


class Drain:
    """What the phases of a stop do to turns. All methods except :meth:`wait_idle` are synchronous."""

    def __init__(self, active: ActiveSessions, proxied_requests: ProxiedRequests, stop: StopState) -> None:
        self._active = active
        self._proxied_requests = proxied_requests
        self._stop = stop

    def check_accepting(self) -> None:
        """Raises: ShuttingDownError, if new work is refused."""
        if self._stop.phase >= Phase.DRAINING:
            raise ShuttingDownError(untouched=True)

    def interrupt_queued(self) -> int:
        """End queued turns as ``interrupted``. Returns the number of turns that end now.

        Where other processes serve in this one's place none ends: queued turns have the rest of the drain, too.
        """
        if self._stop.is_replaced:
            return 0
        return sum(
            turn.cut_short(outcome.Interrupted("shutdown")) for turn in self._active.open_turns() if not turn.running
        )

    def interrupt_all(self) -> int:
        """End all open turns as ``interrupted``. Returns the number of turns that end now.

        Turns of other processes go on, but their streams through this process end after ``cleanup_timeout_s``. If the
        owner of such a turn stops as well, its terminal event arrives within that time.
        """
        self._proxied_requests.end_soon()
        return sum(turn.cut_short(outcome.Interrupted("shutdown")) for turn in self._active.open_turns())

    def interrupt_late(self, turn: Turn) -> None:
        """Interrupt a turn that was being accepted when the phase that interrupts such turns began."""
        if self._stop.phase >= (Phase.INTERRUPTING if turn.running or self._stop.is_replaced else Phase.DRAINING):
            turn.cut_short(outcome.Interrupted("shutdown"))

    @property
    def is_idle(self) -> bool:
        """Whether no turn is open, no end is being stored, no deletion is under way and no request is proxied."""
        return self._active.is_idle and self._proxied_requests.is_idle

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`. Returns without a checkpoint if that is true already."""
        while not self.is_idle:
            await self._active.wait_idle()
            await self._proxied_requests.wait_idle()
