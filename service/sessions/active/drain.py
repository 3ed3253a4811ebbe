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

        Turns that are suspended instead have the rest of the drain, too. Where other processes serve in this one's
        place all queued turns have it.
        """
        if self._stop.is_replaced:
            return 0
        return sum(_interrupt_queued(turn) for turn in self._active.open_turns() if not turn.running)

    def interrupt_all(self) -> int:
        """End all open turns as ``interrupted``, or suspend them. Returns the number of turns that stop now.

        Turns of other processes go on, but their streams through this process end after ``cleanup_timeout_s``. If the
        owner of such a turn stops as well, its terminal event arrives within that time.
        """
        self._proxied_requests.end_soon()
        return sum(turn.cut_short(turn.end_of_stop()) for turn in self._active.open_turns())

    def interrupt_late(self, turn: Turn) -> None:
        """Interrupt or suspend a turn that was being accepted when the phase that does so to such turns began."""
        if self._stop.phase >= Phase.INTERRUPTING:
            turn.cut_short(turn.end_of_stop())
        elif self._stop.phase >= Phase.DRAINING and not turn.running and not self._stop.is_replaced:
            _interrupt_queued(turn)

    @property
    def is_idle(self) -> bool:
        """Whether no turn is open, no end is being stored, no deletion is under way and no request is proxied."""
        return self._active.is_idle and self._proxied_requests.is_idle

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`. Returns without a checkpoint if that is true already."""
        while not self.is_idle:
            await self._active.wait_idle()
            await self._proxied_requests.wait_idle()


def _interrupt_queued(turn: Turn) -> bool:
    """Interrupt a queued turn at the beginning of the drain, unless the turn will be suspended at the end of it.

    Returns whether the turn ends now.
    """
    end = turn.end_of_stop()
    return not isinstance(end, outcome.Suspended) and turn.cut_short(end)
