"""The chunks of a response on HTTP/1.1, written to the connection without h11.

Proven by ``tests/hosting/hypercorn/test_http1_exchange.py`` and ``test_inline_writing.py``.
"""

from typing import Protocol

_END = b"0\r\n\r\n"


class ChunkConnection(Protocol):
    """The connection of a response."""

    @property
    def takes_plain_bytes(self) -> bool: ...

    async def write(self, data: bytes) -> None: ...

    def write_now(self, data: bytes) -> int: ...


class ChunkedResponse:
    """A response whose head has been sent. Meets :class:`~service.api.http.event_stream.PieceWriter`.

    Attributes:
        written_now: The bytes of all pieces of :meth:`write_now` so far, without what the encoding adds.
    """

    def __init__(self, connection: ChunkConnection) -> None:
        self.written_now = 0
        self._rest = b""
        self._has_ended = False
        self._connection = connection

    @property
    def writes_now(self) -> bool:
        """Whether :meth:`write_now` can send anything: not under TLS."""
        return self._connection.takes_plain_bytes

    @property
    def has_rest(self) -> bool:
        """Whether a part of the last piece of :meth:`write_now` is not sent. The next write sends it first."""
        return bool(self._rest)

    def write_now(self, data: bytes) -> bool:
        """Send a piece as far as the kernel takes it now. Returns False if nothing of it was sent, nor is to be."""
        size = len(data)
        if self._rest or self._has_ended or not size:
            return False
        chunk = b"%x\r\n%b\r\n" % (size, data)  # as in `_chunk`, without the call: this is on the way of each token
        sent = self._connection.write_now(chunk)
        if not sent:
            return False
        self._rest = chunk[sent:]
        self.written_now += size
        return True

    async def write(self, data: bytes) -> None:
        """Send a piece. Returns once the kernel has taken the piece, or the client has left."""
        if framed := self._after_rest(_chunk(data)):
            await self._connection.write(framed)

    async def end(self, data: bytes) -> None:
        """Send the last piece and the end of the body together."""
        self._has_ended = True
        await self._connection.write(self._after_rest(_chunk(data) + _END))

    def _after_rest(self, data: bytes) -> bytes:
        rest, self._rest = self._rest, b""
        return rest + data


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""  # an empty chunk is the end of the body
