"""Forwards: answers that are passed on from another process, and what becomes of them when this one leaves."""

from collections.abc import Awaitable, Callable
from math import inf

import trio

_END_ON_ITS_WAY_S = 0.05
"""What the end of another process's turn may take beyond the time that the process has for it."""
_LEAVE_S = 0.04
"""Until an owner has seen that this process leaves. Together they are less than what the phase has left."""


class ProxiedRequests:
    """The forwards that are open. A shutdown waits for them, no longer than it has told them.

    Args:
        nursery: The sessions supervisor's own: what a request leaves behind for an owner ends within the service.
        cleanup_timeout_s: What a process that stops has for the ends of its turns.
    """

    def __init__(self, nursery: trio.Nursery, *, cleanup_timeout_s: float) -> None:
        self._nursery = nursery
        self._cleanup_timeout_s = cleanup_timeout_s
        self._open: set[ProxiedRequest] = set()
        self._leaving = False
        self._changes = trio.lowlevel.ParkingLot()

    def open_request(self) -> "ProxiedRequest":
        """Count one more; it is to be closed."""
        proxied = ProxiedRequest(self._note_closed, self._start_leave)
        if self._leaving:
            proxied.end_by(self._last_end_by())
        self._open.add(proxied)
        return proxied

    def leave(self) -> None:
        """This process goes: those of now and later end with what their owners can tell if they stop as well."""
        self._leaving = True
        for proxied in self._open:
            proxied.end_by(self._last_end_by())

    @property
    def is_idle(self) -> bool:
        """Whether nothing is passed on."""
        return not self._open

    async def wait_idle(self) -> None:
        """Return once it :attr:`is_idle`; at once and without a checkpoint if it is."""
        while self._open:
            await self._changes.park()

    def _last_end_by(self) -> float:
        """When an owner that stops as well has told its ends, and they have come here."""
        return trio.current_time() + self._cleanup_timeout_s + _END_ON_ITS_WAY_S

    def _start_leave(self, proxied: "ProxiedRequest", call: Callable[[], Awaitable[None]]) -> bool:
        try:
            self._nursery.start_soon(_run_leave, proxied, call, name="taking leave of an owner")
        except RuntimeError:  # it is closed: a request that outlives the service
            return False
        return True

    def _note_closed(self, proxied: "ProxiedRequest") -> None:
        self._open.discard(proxied)
        self._changes.unpark_all()


async def _run_leave(proxied: "ProxiedRequest", call: Callable[[], Awaitable[None]]) -> None:
    with trio.move_on_after(_LEAVE_S):
        await call()
    proxied.close()


class ProxiedRequest:
    """An answer on its way from the process that owns a session through this one. Closing twice is closing once.

    Args:
        note_closed: Called when it is closed.
        start: Starts a task that closes it; False where the service is closed already.
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
        """The scope of one wait for the owner; left early once the answer is cut off."""
        self._scope = trio.CancelScope(deadline=self._deadline)
        return self._scope

    def end_by(self, deadline: float) -> None:
        """This process is leaving: whatever is not there by then does not come through it."""
        self._deadline = self._scope.deadline = deadline

    @property
    def was_cut(self) -> bool:
        """Whether it was over because this process leaves."""
        return self._deadline <= trio.current_time()

    def take_leave(self, call: Callable[[], Awaitable[None]]) -> bool:
        """Close it after a last call, which the shutdown waits for: the request that it belonged to is over.

        False, and nothing happens, where the service is closed already.
        """
        return self._start(self, call)

    def close(self) -> None:
        self._note_closed(self)
