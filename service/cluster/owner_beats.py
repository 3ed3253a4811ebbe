"""The beats of owners: how this process notices that an owner hangs, and ends the requests that wait for it.

An owner that dies closes its connections, an owner that hangs (SIGSTOP, a blocked event loop) does not. So an owner
sends a byte each second to each process that has requests proxied to it for a while, on a connection for beats alone.
When three beats are missing, these requests end, and new ones are refused until the owner is heard again. An owner of
an earlier version has no beats: it closes the connection, and is waited for as before.

A freeze of this process is no silence of the owner: the beats that have arrived meanwhile are read first.
"""

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import structlog
import trio

from service.cluster.peer_proof import PeerGoneError, prove_to_owner
from service.cluster.peer_transport import PeerStream, PeerTransport
from service.errors import PeerUntrustedError, ResourcesExhaustedError
from service.freezes import ScopeDeadline, extended_when_late
from service.telemetry.log_context import log_context

logger = structlog.get_logger("lastcall.cluster")

BEAT_INTERVAL_S = 1.0
SILENCE_S = 3 * BEAT_INTERVAL_S
"""An owner that was not heard for this time hangs."""
START_AFTER_S = 1.0
"""Requests that are answered sooner need no beats."""
_OUT_OF_REACH = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class Waiting(Protocol):
    """A request that waits for its owner."""

    def end_for_silence(self) -> None: ...


async def send_beats(stream: PeerStream) -> None:
    """Beat until the peer has closed the connection, or takes no more beats. Closes the connection."""
    async with stream:
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError, PeerUntrustedError):
            while True:
                with trio.move_on_after(SILENCE_S) as bound:
                    await stream.send_all(b".")
                if bound.cancelled_caught:
                    return
                await trio.sleep(BEAT_INTERVAL_S)


class OwnerBeats:
    """The owners to which requests are proxied, by address.

    Args:
        nursery: Runs a task for each of these owners, while requests wait for it or it hangs.
        secret: Returns the secret of the store.
        transport: How the owners are reached.
    """

    def __init__(self, nursery: trio.Nursery, *, secret: Callable[[], bytes], transport: PeerTransport) -> None:
        self._nursery = nursery
        self._secret = secret
        self._transport = transport
        self._owners: dict[str, _Owner] = {}

    def hangs(self, address: str) -> bool:
        """Whether an owner hangs, as far as this process knows."""
        owner = self._owners.get(address)
        return owner is not None and owner.hangs

    def add(self, request: Waiting, address: str) -> None:
        """Call ``request.end_for_silence()`` once if the owner hangs, or falls silent before :meth:`discard`."""
        owner = self._owners.get(address)
        if owner is not None and owner.hangs:  # it may have fallen silent since the caller asked
            request.end_for_silence()
            return
        if owner is None:
            owner = _Owner(address, self._secret, self._transport)
            try:
                self._nursery.start_soon(self._run, owner, name="listen for beats")
            except RuntimeError:  # the nursery is closed: this request outlives the service
                return
            self._owners[address] = owner
        owner.requests.add(request)

    def discard(self, request: Waiting, address: str) -> None:
        """Note the end of a request. Has no effect the second time."""
        owner = self._owners.get(address)
        if owner is not None:
            owner.requests.discard(request)
            owner.changed.unpark_all()

    async def _run(self, owner: "_Owner") -> None:
        try:
            with log_context():  # and not the request that had the task started
                await owner.run()
                while owner.requests:  # a request that came while the listening ended
                    await owner.run()
        finally:
            del self._owners[owner.address]


class _Owner:
    """One owner. Its task listens while requests wait for it, and from its silence on until it is heard or gone."""

    def __init__(self, address: str, secret: Callable[[], bytes], transport: PeerTransport) -> None:
        self.address = address
        self._transport = transport
        self.requests: set[Waiting] = set()
        self.hangs = False
        self.changed = trio.lowlevel.ParkingLot()
        self._secret = secret
        self._deadline: ScopeDeadline | None = None

    def __repr__(self) -> str:
        return f"<_Owner {self.address}: {'hangs' if self.hangs else 'beats'}, {len(self.requests)} requests>"

    async def run(self) -> None:
        await trio.sleep(START_AFTER_S)
        if not self.requests:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear)
            while self.requests:
                with (
                    trio.move_on_after(SILENCE_S) as silence,
                    extended_when_late(silence, timeout_s=SILENCE_S) as self._deadline,
                ):
                    await self._wait_while(lambda: bool(self.requests))
                if silence.cancelled_caught:
                    self._fall_silent()
                    await self._wait_while(lambda: self.hangs)
            nursery.cancel_scope.cancel()

    async def _wait_while(self, condition: Callable[[], bool]) -> None:
        while condition():
            await self.changed.park()

    def _fall_silent(self) -> None:
        self.hangs = True
        logger.warning("another worker hangs: requests that wait for it end here", requests=len(self.requests))
        for request in tuple(self.requests):
            request.end_for_silence()

    def _note_sign(self) -> None:
        """Note a beat, or another sign that the owner does not hang."""
        if self.hangs:
            self.hangs = False
            logger.info("another worker does not hang any more, or is gone")
            self.changed.unpark_all()
        if self._deadline is not None:
            self._deadline.restart()

    async def _hear(self) -> None:
        """Listen for beats. An owner that closes the connection does not hang, though it may have no beats to send.

        One that is out of reach hangs, as far as this process can tell.
        """
        while True:
            was_cut_off = False
            with suppress(ResourcesExhaustedError):
                stream = await self._transport.wait(self.address)
                if stream is not None:
                    async with stream:
                        was_cut_off = await self._hear_beats(stream)
            if not was_cut_off:
                self._note_sign()
            await trio.sleep(BEAT_INTERVAL_S)

    async def _hear_beats(self, stream: PeerStream) -> bool:
        """Listen on a connection until it ends. Returns whether it ended because the owner is out of reach."""
        try:
            if await prove_to_owner(stream, self._secret(), address=self.address, purpose="beats"):
                while await stream.receive_some(64):
                    self._note_sign()
        except trio.BrokenResourceError as error:
            return getattr(error.__cause__, "errno", None) in _OUT_OF_REACH
        except (OSError, PeerGoneError, PeerUntrustedError):
            pass
        return False
