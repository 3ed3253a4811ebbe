"""HTTP/2 whose requests may be answered before they have arrived.

hypercorn forgets a stream with the end of its answer, and fails at the data that the client still sends on it: the
connection ends, with all other streams on it. A refusal (a wrong key, a body that is too long, a server that is full)
is such an answer, and behind a proxy that speaks HTTP/2 the other streams are other users'. Here that data is dropped.
hypercorn then gives its bytes back to the connection's window, which the other requests need.
Proven by ``tests/hosting/hypercorn/test_open_streams.py``.
"""

from typing import Any, cast

from hypercorn.protocol.events import Event
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import WSStream


class Http2Protocol(H2Protocol):
    """hypercorn's HTTP/2; what arrives on a stream that has been answered is dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.streams = OpenStreams(self.streams)


class OpenStreams(dict[int, HTTPStream | WSStream]):
    """The open streams of a connection, by id. In the place of every other stream is one that drops its events."""

    def __missing__(self, stream_id: int) -> HTTPStream | WSStream:
        return cast("HTTPStream", _ANSWERED)


class _Answered:
    """A stream that has been answered, or reset."""

    async def handle(self, event: Event) -> None:
        """Drop what the client has sent."""


_ANSWERED = _Answered()
