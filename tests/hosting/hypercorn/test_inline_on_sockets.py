"""Events that the appending task writes, on real sockets: resets, full buffers, clients that stall."""

import socket
import struct
from typing import Any

import trio
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from service.api.http.event_stream import stream_response
from service.api.http.request_body import BoundedRequest
from service.api.http.request_resources import request_resources
from service.api.native.event_frames import encode_frame
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.hypercorn.connections import Connections
from service.sessions.events.events import TurnDelta
from service.sessions.events.streams import Streams
from service.stop_state import StopState
from tests.hosting.conftest import PATIENT_S, Serve, Served
from tests.hosting.hypercorn.test_inline_writing import MIB, Log, dechunked


class App(QuartTrio):
    """An application that streams one log."""

    request_class = BoundedRequest

    def __init__(self) -> None:
        super().__init__("test")
        self.asgi_http_class = AsgiRequest
        self.config["RESPONSE_TIMEOUT"] = None
        self.log = Log()
        self.streams = Streams(streams_max=100, heartbeat_interval_s=15, stop=StopState())
        self.route("/")(self.stream)

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        with request_resources(scope):
            await super().asgi_app(scope, receive, send)

    async def stream(self) -> TrioResponse:
        return stream_response(self.log, self.streams.open_stream(), after=0, encode=encode_frame)

    async def are_waiting(self, count: int) -> None:
        """Return once so many streams wait for an event."""
        with trio.fail_after(PATIENT_S):
            while len(self.log._waiting) < count:  # noqa: ASYNC110  a stream tells nobody that it waits
                await trio.sleep(0.001)

    async def are_open(self, count: int) -> None:
        """Return once so many streams are open."""
        with trio.fail_after(PATIENT_S):
            while self.streams.open != count:  # noqa: ASYNC110  a slot tells nobody that it is closed
                await trio.sleep(0.001)


async def ask(server: Served, *, buffer_bytes: int | None = None) -> trio.SocketStream:
    """A client's stream, of which nothing is read yet."""
    sock = trio.socket.socket()
    if buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    await sock.connect(("127.0.0.1", server.port))
    client = trio.SocketStream(sock)
    await client.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client


def arrived(client: trio.SocketStream) -> bytes:
    """What has arrived, without a round of the event loop."""
    raw = socket.socket(fileno=client.socket.fileno())
    try:
        return raw.recv(MIB, socket.MSG_DONTWAIT)
    finally:
        raw.detach()


async def read_to_the_end(client: trio.SocketStream) -> bytes:
    data = b""
    with trio.fail_after(PATIENT_S):
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += await client.receive_some(1000)
    return dechunked(data.partition(b"\r\n\r\n")[2].removesuffix(b"0\r\n\r\n"))


async def test_a_client_has_an_event_in_the_step_that_appends_it(serve: Serve, connections: Connections) -> None:
    app = App()
    async with serve(app) as server, await ask(server) as client:
        await app.are_waiting(1)
        assert arrived(client).endswith(b"retry: 1000\n\r\n")
        for seq in range(1, 80):
            app.log.add("Hi")
            assert encode_frame(TurnDelta(seq=seq, text="Hi")) in arrived(client)
        app.log.end()
        await read_to_the_end(client)
        await app.are_open(0)
        assert (app.streams.open, app.streams.ended) == (0, 1)


async def test_a_client_that_resets_its_connection_harms_no_other_stream_and_is_noticed(
    serve: Serve, connections: Connections
) -> None:
    app = App()
    async with serve(app) as server, await ask(server) as first, await ask(server) as broken, await ask(server) as last:
        await app.are_waiting(3)
        app.log.add()
        broken.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        broken.socket.close()
        for _ in range(5):
            app.log.add()  # before the reader of the connection has seen the reset
        app.log.tell_readers()
        await app.are_open(2)
        app.log.add()
        app.log.end()
        for client in (first, last):
            assert (await read_to_the_end(client)).removeprefix(b"retry: 1000\n") == app.log.frames(encode_frame)
        await app.are_open(0)
    assert (app.streams.open, app.streams.ended, app.streams.aborted) == (0, 2, 1)


async def test_a_client_that_stalls_and_goes_on_gets_every_frame_once(serve: Serve, connections: Connections) -> None:
    app = App()
    async with serve(app) as server, await ask(server, buffer_bytes=4096) as client, await ask(server) as other:
        await app.are_waiting(2)
        for _ in range(4000):
            app.log.add("x" * 1500)
            if len(app.log._waiting) < 2:
                break
        assert len(app.log._waiting) == 1, "the stalled stream's task was woken"
        for _ in range(50):
            app.log.add("y" * 100)
            await trio.lowlevel.checkpoint()
        app.log.end()
        for each in (other, client):
            assert (await read_to_the_end(each)).removeprefix(b"retry: 1000\n") == app.log.frames(encode_frame)
        await app.are_open(0)
    assert app.streams.ended == 2
