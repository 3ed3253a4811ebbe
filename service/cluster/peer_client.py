"""The client's side of one HTTP/1.1 request to another process of this service."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import h11
import msgspec
import structlog
import trio

from service.cluster.peer_proof import PeerGoneError, prove_to_owner
from service.cluster.peer_transport import PeerStream, end_sending, leave, may_be_asked
from service.errors import InvalidRequestError, PeerUntrustedError, StoreError

logger = structlog.get_logger("lastcall.cluster")

PEER_GONE = (OSError, trio.BrokenResourceError, h11.RemoteProtocolError, PeerGoneError, PeerUntrustedError)
"""The errors of a connection whose peer has died, or is lost.

:class:`PeerUntrustedError` is one: with TLS 1.3 the alert that tells it may come late, after bytes of an answer.
"""
_TAKEN = "The address of the process that runs these turns was taken by another process."


class PeerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to a peer: ``target`` with its query, ``headers`` without ``content-length`` and ``connection``."""

    method: str
    target: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


class PeerConnection:
    """A connection that carries one request. Closed by :meth:`close` or :meth:`half_close`.

    Args:
        stream: A connected stream that was not used yet; closed with this connection.
        address: The peer's address, for the proof.
        secret: The secret of the store, which both processes know.

    Attributes:
        has_asked: Whether the request may have reached the peer.
        accepted_as: The path of the turn as which the peer has accepted the request, if it has said so.
    """

    def __init__(self, stream: PeerStream, *, address: str, secret: bytes) -> None:
        self.has_asked = False
        self.accepted_as: str | None = None
        self._stream = stream
        self._address = address
        self._secret = secret
        self._protocol = h11.Connection(h11.CLIENT)

    @property
    def is_closed(self) -> bool:
        return self._stream.socket.fileno() < 0

    def close(self) -> None:
        """Close at once; the peer sees that the client has left. Closing twice has no effect."""
        leave(self._stream)

    async def half_close(self) -> None:
        """Close the sending side: the peer sees that the client may come back. Returns when the peer has closed.

        A peer that got no request is not told anything: it may be a stranger, and the handshake may not be complete.
        """
        if not self.has_asked:
            self.close()
            return
        try:
            with suppress(*PEER_GONE, trio.ClosedResourceError):
                await end_sending(self._stream)
                while await self._stream.receive_some(65536):
                    pass
        finally:
            self.close()

    async def ask(
        self, request: PeerRequest, *, is_stream: Callable[[h11.Response], bool], note_accepted: Callable[[], None]
    ) -> tuple[h11.Response, bytes] | None:
        """Send a request. Returns the answer, or None if the peer dies, or the connection breaks, before the answer.

        Args:
            is_stream: Whether an answer's body is a stream. The caller then reads it with :meth:`receive_body`.
            note_accepted: Called once the peer says that it has accepted the request as a turn: no other process will
                have to answer it.

        Raises:
            InvalidRequestError: HTTP/1.1 cannot express a header of the request.
            StoreError: The listener at this address does not know the store's secret, or has another user.
            PeerUntrustedError: A certificate is not accepted on one of the two sides, and nothing was asked.
        """
        try:
            if not may_be_asked(self._stream):
                raise StoreError(_TAKEN)
            if not await prove_to_owner(self._stream, self._secret, address=self._address):
                raise StoreError(_TAKEN)
            self.has_asked = True
            await self._send(request)
            del request
            head = await self._receive_head(note_accepted)
            return head, b"" if is_stream(head) else await self._receive_whole_body()
        except h11.LocalProtocolError as error:
            raise InvalidRequestError(f"This request has a header that cannot be passed on: {error}.") from error
        except PeerUntrustedError as error:
            logger.warning("another replica cannot be asked: a certificate is not accepted", reason=error.reason)
            if self.has_asked:  # a late alert: the peer may have accepted the request
                return None
            raise
        except PEER_GONE:
            return None

    async def _send(self, request: PeerRequest) -> None:
        headers = [*request.headers, (b"content-length", b"%d" % len(request.body)), (b"connection", b"close")]
        data = b"".join(
            self._protocol.send(event) or b""
            for event in (
                h11.Request(method=request.method, target=request.target, headers=headers),
                h11.Data(data=request.body),
                h11.EndOfMessage(),
            )
        )
        with suppress(trio.BrokenResourceError):  # the peer may answer before it has read everything
            await self._stream.send_all(data)

    async def _receive_head(self, note_accepted: Callable[[], None]) -> h11.Response:
        event = await self._next_event()
        while isinstance(event, h11.InformationalResponse):
            locations = [value.decode("latin-1") for name, value in event.headers if name == b"location"]
            if locations:
                self.accepted_as = locations[0]
                note_accepted()
            event = await self._next_event()
        if not isinstance(event, h11.Response):
            raise h11.RemoteProtocolError("the peer has closed the connection")
        return event

    async def _receive_whole_body(self) -> bytes:
        body = bytearray()
        while data := await self.receive_body():
            body += data
        return bytes(body)

    async def receive_body(self) -> bytes:
        """The next part of the body; empty at its end."""
        event = await self._next_event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._protocol.next_event()) is h11.NEED_DATA:
            self._protocol.receive_data(await self._stream.receive_some(65536))
        return event  # type: ignore[return-value]
