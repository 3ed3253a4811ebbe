"""Proxied requests: answers that this process passes on from their owner, and their end when this process stops."""

from collections.abc import Awaitable, Callable
from math import inf

import trio

from service.stop_state import Phase, StopState

_END_ON_ITS_WAY_S = 0.05
"""How much later than its own bound the end of another process's turn may arrive here."""
_CLOSE_S = 0.04
"""How long an owner may take to see that this process stops. Both together fit in the rest of the phase."""


class ProxiedRequests:
    """The open proxied requests. A shutdown waits for them until the deadline that :meth:`end_soon` sets.

    Args:
        nursery: The nursery of the sessions supervisor, so that the last call to an owner ends within the service.
        cleanup_timeout_s: How long an owner that stops as well may take for the ends of its turns.
        stop: Whether this process stops.
    """

    def __init__(self, nursery: trio.Nursery, *, cleanup_timeout_s: float, stop: StopState) -> None:
        self._nursery = nursery
        self._cleanup_timeout_s = cleanup_timeout_s
        self._open: set[ProxiedRequest] = set()
        self._stop = stop
        self._changes = trio.lowlevel.ParkingLot()

    def open_request(self) -> "ProxiedRequest":
        """Open one more request, which the caller must close."""
        proxied = ProxiedRequest(self._note_closed, self._start_close)
        if self._stop.phase >= Phase.INTERRUPTING:
            proxied.end_by(self._last_end_by())
        self._open.add(proxied)
        return proxied

    def end_soon(self) -> None:
        """Set a deadline for all requests, as this process stops. Ends of owners that stop as well arrive by then."""
        for proxied in self._open:
            proxied.end_by(self._last_end_by())

    @property
    def is_idle(self) -> bool:
        """Whether no request is open."""
        return not self._open

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`. Returns without a checkpoint if that is true already."""
        while self._open:
            await self._changes.park()

    def _last_end_by(self) -> float:
        """The time by which the ends of an owner that stops as well have arrived here."""
        return trio.current_time() + self._cleanup_timeout_s + _END_ON_ITS_WAY_S

    def _start_close(self, proxied: "ProxiedRequest", call: Callable[[], Awaitable[None]]) -> bool:
        try:
            self._nursery.start_soon(_run_close, proxied, call, name="close a proxied request")
        except RuntimeError:  # the nursery is closed: this request outlives the service
            return False
        return True

    def _note_closed(self, proxied: "ProxiedRequest") -> None:
        self._open.discard(proxied)
        self._changes.unpark_all()


async def _run_close(proxied: "ProxiedRequest", call: Callable[[], Awaitable[None]]) -> None:
    with trio.move_on_after(_CLOSE_S):
        await call()
    proxied.close()


class ProxiedRequest:
    """An answer that this process passes on from a session's owner. Closing it twice has no effect.

    Args:
        note_closed: Called when the request is closed.
        start: Starts a task that closes the request; returns False if the service is closed already.
    """

    def __init__(
        self,
        note_closed: Callable[["ProxiedRequest"], None],
        start: Callable[["ProxiedRequest", Callable[[], Awaitable[None]]], bool],
    ) -> None:
        self._note_closed = note_closed
        self._start = start
        self._deadline = inf
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<ProxiedRequest: {'cut' if self.was_cut else 'open'}>"

    def waiting(self) -> trio.CancelScope:
        """The cancel scope of one wait for the owner; cancelled when the answer is cut off."""
        self._scope = trio.CancelScope(deadline=self._deadline)
        return self._scope

    def end_by(self, deadline: float) -> None:
        """Cut the answer off at ``deadline``, because this process stops."""
        self._deadline = self._scope.deadline = deadline

    @property
    def was_cut(self) -> bool:
        """Whether the answer was cut off because this process stops."""
        return self._deadline <= trio.current_time()

    def close_after(self, call: Callable[[], Awaitable[None]]) -> bool:
        """Close this request after a last call to the owner, for which the shutdown waits.

        Returns False, and does nothing, if the service is closed already.
        """
        return self._start(self, call)

    def close(self) -> None:
        self._note_closed(self)
