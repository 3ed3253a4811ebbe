"""A chunked response on HTTP/1 whose pieces are written to the connection without h11.

hypercorn and h11 take 30 microseconds for each piece and send the end of the body separately. A piece can be framed
without them, and framing changes no state of theirs. Proven by ``tests/hosting/hypercorn/test_chunked_response.py``.
"""

from time import time
from typing import Self

import h11
from h11._writers import ChunkedWriter
from hypercorn.events import Closed
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

from service.hosting.hypercorn.connections import Connection

_END = b"0\r\n\r\n"


class ChunkedResponse:
    """A response whose head has been sent. Meets :class:`~service.api.http.event_stream.PieceWriter`."""

    def __init__(self, stream: HTTPStream, protocol: H11Protocol, connection: Connection) -> None:
        self._rest = b""
        self._stream = stream
        self._protocol = protocol
        self._connection = connection

    @classmethod
    def begun_by(cls, send: object) -> Self | None:
        """Return the response that a request's ASGI ``send`` has begun; None if it is not a chunked one on HTTP/1."""
        stream = getattr(send, "__self__", None)
        if not isinstance(stream, HTTPStream) or stream.state is not ASGIHTTPState.RESPONSE:
            return None
        protocol = getattr(stream.send, "__self__", None)
        if not isinstance(protocol, H11Protocol) or not isinstance(protocol.connection, h11.Connection):
            return None
        connection = getattr(protocol.send, "__self__", None)
        if not isinstance(connection, Connection) or not isinstance(protocol.connection._writer, ChunkedWriter):
            return None
        return cls(stream, protocol, connection)

    async def write(self, data: bytes) -> None:
        """Send a piece. Returns once the kernel has taken the piece; hypercorn notices a client that has left."""
        await self._connection.write(self._after_rest(_chunk(data)))

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
        if self._rest:
            return False
        chunk = _chunk(data)
        sent = self._connection.write_now(chunk)
        self._rest = chunk[sent:] if sent else b""
        return sent > 0

    def _after_rest(self, data: bytes) -> bytes:
        rest, self._rest = self._rest, b""
        return rest + data

    async def end(self, data: bytes) -> None:
        """Send the last piece and the end of the body together. hypercorn then goes on as after its own end.

        A connection that is to close closes at once: h11 and hypercorn do not prepare it for another request first.
        """
        stream = self._stream
        closes = self._connection.closes_after_response
        end = _END if closes else self._protocol.connection.send(h11.EndOfMessage())
        await self._connection.write(self._after_rest(_chunk(data) + end))
        stream.state = ASGIHTTPState.CLOSED
        await stream.config.log.access(stream.scope, stream.response, time() - stream.start_time)
        if closes:
            stream.closed = True
            await self._connection.protocol_send(Closed())
        else:
            await stream.send(StreamClosed(stream_id=stream.stream_id))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""  # an empty chunk is the end of the body
