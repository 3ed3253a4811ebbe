"""Proxied requests: answers that this process passes on from their owner, and their end when this process stops."""

from collections.abc import Awaitable, Callable
from math import inf

import structlog
import trio

from service.cluster.owner_beats import OwnerBeats
from service.cluster.peer_transport import PeerTransport
from service.stop_state import Phase, StopState

logger = structlog.get_logger("lastcall.cluster")

_END_ON_ITS_WAY_S = 0.05
"""How much later than its own bound the end of another process's turn may arrive here."""
_CLOSE_S = 0.04
"""How long an owner may take to see that this process stops. Both together fit in the rest of the phase."""


class ProxiedRequests:
    """The open proxied requests. A shutdown waits for them until the deadline that :meth:`end_soon` sets.

    Args:
        nursery: The nursery of the sessions supervisor, so that the last call to an owner ends within the service.
        cleanup_timeout_s: How long an owner that stops as well may take for the ends of its turns.
        secret: Returns the secret of the store.
        stop: Whether this process stops.
        transport: How the owners are reached.

    Attributes:
        beats: The owners' beats, which end the requests of an owner that hangs.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        cleanup_timeout_s: float,
        secret: Callable[[], bytes],
        stop: StopState,
        transport: PeerTransport,
    ) -> None:
        self.transport = transport
        self.beats = OwnerBeats(nursery, secret=secret, transport=transport)
        self._nursery = nursery
        self._cleanup_timeout_s = cleanup_timeout_s
        self._open: set[ProxiedRequest] = set()
        self._stop = stop
        self._changes = trio.lowlevel.ParkingLot()

    def open_request(self, address: str, *, is_look: bool = False) -> "ProxiedRequest":
        """Open one more request to the owner at ``address``. The caller must close the request.

        Args:
            is_look: The request waits for a change, and is as good without it: a stop does not wait for the request.
        """
        proxied = ProxiedRequest(address, self._note_closed, self._start_close, is_look=is_look)
        if self._stop.phase >= Phase.INTERRUPTING:
            proxied.end_by(self._last_end_by(proxied))
        self._open.add(proxied)
        self.beats.add(proxied, address)
        return proxied

    def end_soon(self) -> None:
        """Set a deadline for all requests, as this process stops. Ends of owners that stop as well arrive by then."""
        for proxied in self._open:
            proxied.end_by(self._last_end_by(proxied))

    @property
    def is_idle(self) -> bool:
        """Whether no request is open for which a stop waits."""
        return all(proxied.is_look for proxied in self._open)

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`. Returns without a checkpoint if that is true already."""
        while not self.is_idle:
            await self._changes.park()

    def _last_end_by(self, proxied: "ProxiedRequest") -> float:
        """The time by which the end of an owner that stops as well has arrived here. A look ends at once."""
        return trio.current_time() + (0 if proxied.is_look else self._cleanup_timeout_s + _END_ON_ITS_WAY_S)

    def _start_close(self, proxied: "ProxiedRequest", call: Callable[[], Awaitable[None]]) -> bool:
        try:
            if proxied.owner_hangs:
                # The owner must see the half-closed connection when it goes on. The shutdown does not wait for that.
                self._nursery.start_soon(_guarded, call, name="close a request of an owner that hangs")
                proxied.close()
            else:
                self._nursery.start_soon(_run_close, proxied, call, name="close a proxied request")
        except RuntimeError:  # the nursery is closed: this request outlives the service
            return False
        return True

    def _note_closed(self, proxied: "ProxiedRequest") -> None:
        self._open.discard(proxied)
        self.beats.discard(proxied, proxied.address)
        self._changes.unpark_all()


async def _run_close(proxied: "ProxiedRequest", call: Callable[[], Awaitable[None]]) -> None:
    try:
        with trio.move_on_after(_CLOSE_S):
            await _guarded(call)
    finally:
        proxied.close()


async def _guarded(call: Callable[[], Awaitable[None]]) -> None:
    """Run a last call to an owner. The call runs beside all turns of this process, so no error of it may get out."""
    try:
        await call()
    except Exception:
        logger.exception("closing the connection to another worker failed")


class ProxiedRequest:
    """An answer that this process passes on from a session's owner. Closing it twice has no effect.

    Args:
        address: The owner's address.
        note_closed: Called when the request is closed.
        start: Starts a task that closes the request; returns False if the service is closed already.

    Attributes:
        is_look: Whether a stop does not wait for the answer.
        owner_hangs: Whether the answer was cut off because the owner hangs.
    """

    def __init__(
        self,
        address: str,
        note_closed: Callable[["ProxiedRequest"], None],
        start: Callable[["ProxiedRequest", Callable[[], Awaitable[None]]], bool],
        *,
        is_look: bool = False,
    ) -> None:
        self.address = address
        self.is_look = is_look
        self.owner_hangs = False
        self._note_closed = note_closed
        self._start = start
        self._deadline = inf
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<ProxiedRequest: {'cut' if self.was_cut or self.owner_hangs else 'open'}>"

    def waiting(self) -> trio.CancelScope:
        """The cancel scope of one wait for the owner; cancelled when the answer is cut off."""
        self._scope = trio.CancelScope(deadline=self._deadline)
        if self.owner_hangs:
            self._scope.cancel()
        return self._scope

    def end_by(self, deadline: float) -> None:
        """Cut the answer off at ``deadline``, because this process stops."""
        self._deadline = self._scope.deadline = deadline

    def end_for_silence(self) -> None:
        """Cut the answer off now, because the owner hangs."""
        self.owner_hangs = True
        self._scope.cancel()

    @property
    def was_cut(self) -> bool:
        """Whether the answer was cut off because this process stops."""
        return self._deadline <= trio.current_time()

    def close_after(self, call: Callable[[], Awaitable[None]]) -> bool:
        """Close this request after a last call to the owner, for which the shutdown waits, unless the owner hangs.

        Returns False, and does nothing, if the service is closed already.
        """
        return self._start(self, call)

    def close(self) -> None:
        self._note_closed(self)
