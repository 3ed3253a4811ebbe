"""Event streams over one HTTP/2 connection, judged by the same rules as over HTTP/1.1.

END_STREAM counts as the last chunk. A stream that ends by RST_STREAM was reset; a stream whose connection closed
before either of them was truncated.
"""

import socket
import time
from collections.abc import Callable

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from bench.poller import receive_some, send_all
from bench.wire import StreamJudge, StreamResult


class Http2Judge:
    """A client with prior knowledge: add its requests, then run it."""

    def __init__(self, *, authority: str) -> None:
        self._authority = authority
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._connection.initiate_connection()
        self._judges: dict[int, StreamJudge] = {}

    def request(self, path: str, headers: dict[str, str], body: bytes, result: StreamResult) -> None:
        """Add a POST whose response is to be judged into ``result``."""
        stream = self._connection.get_next_available_stream_id()
        fields = [
            (":method", "POST"),
            (":path", path),
            (":scheme", "http"),
            (":authority", self._authority),
            ("content-type", "application/json"),
            *((name.lower(), value) for name, value in headers.items()),
        ]
        self._connection.send_headers(stream, fields)
        self._connection.send_data(stream, body, end_stream=True)
        self._judges[stream] = StreamJudge(result)

    async def run(self, sock: socket.socket, *, on_ready: Callable[[], None]) -> None:
        """Read until the connection ends; call ``on_ready`` once every stream has a token or has ended."""
        ready = False
        try:
            await send_all(sock, self._connection.data_to_send())
            while data := await receive_some(sock):
                for event in self._connection.receive_data(data):
                    self._take(event)
                await send_all(sock, self._connection.data_to_send())
                if not ready and all(judge.ended or judge.result.tokens for judge in self._judges.values()):
                    ready = True
                    on_ready()
            self._end_all(lambda judge: judge.end_of_input(time.monotonic()))
        except (OSError, h2.exceptions.ProtocolError):
            self._end_all(lambda judge: judge.reset(time.monotonic()))
        if not ready:
            on_ready()

    def _end_all(self, end: Callable[[StreamJudge], None]) -> None:
        for judge in self._judges.values():
            if not judge.ended:
                end(judge)

    def _take(self, event: h2.events.Event) -> None:
        now = time.monotonic()
        match event:
            case h2.events.ResponseReceived():
                headers = {bytes(n).decode(): bytes(v).decode() for n, v in event.headers}
                self._judges[event.stream_id].take_head(int(headers[":status"]), headers)
            case h2.events.DataReceived():
                self._judges[event.stream_id].take_body(event.data, now)
                self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded():
                self._judges[event.stream_id].last_chunk(now)
            case h2.events.StreamReset():
                self._judges[event.stream_id].reset(now)
            case h2.events.ConnectionTerminated() if event.error_code:
                self._end_all(lambda judge: judge.reset(now))
