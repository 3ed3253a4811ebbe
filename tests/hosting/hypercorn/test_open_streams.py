"""What HTTP/2 clients still send of requests that are answered already."""

from collections.abc import AsyncIterator

import h2.config
import h2.connection
import h2.events
import pytest
import trio
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.hypercorn.connections import Connections
from tests.hosting.conftest import Serve

BODY_BYTES = 500_000
"""More than a connection's window: the client can send it only if the server grants more."""
STREAMING, REFUSED, ASKED = 1, 3, 5


class App(QuartTrio):
    def __init__(self) -> None:
        super().__init__("test")
        self.asgi_http_class = AsgiRequest
        self.work_ended = trio.Event()
        self.route("/")(self.index)
        self.route("/streaming")(self.streaming)
        self.route("/refused", methods=["POST"])(self.refused)

    async def index(self) -> str:
        return "here"

    async def streaming(self) -> TrioResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await self.work_ended.wait()
            yield b"last"

        response = TrioResponse(body())
        response.timeout = None
        return response

    async def refused(self) -> tuple[str, int]:
        return "wrong key", 401


class Client:
    """A client of HTTP/2 that takes what the server sends."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration())
        self.connection.initiate_connection()
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self._stream = stream

    def ask(self, stream_id: int, method: str, path: str, *, ends: bool = True) -> None:
        head = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "localhost")]
        self.connection.send_headers(stream_id, head, end_stream=ends)

    async def exchange(self) -> None:
        """Send what is to be sent, and take what arrives next.

        Raises:
            EndOfChannel: The server has closed the connection.
        """
        await self.flush()
        data = await self._stream.receive_some()
        if not data:
            raise trio.EndOfChannel
        for event in self.connection.receive_data(bytes(data)):
            if isinstance(event, h2.events.DataReceived):
                assert event.stream_id is not None
                assert event.data is not None
                self.bodies[event.stream_id] = self.bodies.get(event.stream_id, b"") + event.data
            elif isinstance(event, h2.events.StreamEnded):
                assert event.stream_id is not None
                self.ended.add(event.stream_id)
        await self.flush()

    async def flush(self) -> None:
        await self._stream.send_all(self.connection.data_to_send())

    async def upload(self, stream_id: int, count: int) -> None:
        """Send ``count`` bytes of a body and its end, as the server's windows allow."""
        while count:
            size = min(
                count,
                self.connection.local_flow_control_window(stream_id),
                self.connection.max_outbound_frame_size,
            )
            if size == 0:
                await self.exchange()
                continue
            count -= size
            self.connection.send_data(stream_id, bytes(size), end_stream=count == 0)
            await self.flush()


async def upload_after_the_answer(serve: Serve) -> dict[int, bytes]:
    """Send a body whose request is answered at its head, beside a stream. Returns the bodies of the answers."""
    app = App()
    async with serve(app) as server:
        with trio.fail_after(10):
            async with await server.connect() as stream:
                client = Client(stream)
                client.ask(STREAMING, "GET", "/streaming")
                client.ask(REFUSED, "POST", "/refused", ends=False)
                client.connection.send_data(REFUSED, b"begin")
                while REFUSED not in client.ended or STREAMING not in client.bodies:
                    await client.exchange()
                await client.upload(REFUSED, BODY_BYTES)
                client.ask(ASKED, "GET", "/")
                while ASKED not in client.ended:
                    await client.exchange()
                app.work_ended.set()
                while STREAMING not in client.ended:
                    await client.exchange()
                return client.bodies


async def test_a_body_that_arrives_after_the_answer_does_not_end_the_other_streams_of_its_connection(
    serve: Serve, connections: Connections
) -> None:
    bodies = await upload_after_the_answer(serve)
    assert bodies == {STREAMING: b"firstlast", REFUSED: b"wrong key", ASKED: b"here"}


@pytest.mark.removal
async def test_hypercorn_still_ends_a_connection_for_a_body_that_arrives_after_the_answer(serve: Serve) -> None:
    """This test fails once hypercorn drops such a body; then Http2Protocol and OpenStreams are not needed."""
    ended_by = None
    try:
        await upload_after_the_answer(serve)
    except ExceptionGroup as errors:
        ended_by = errors.subgroup((KeyError, trio.EndOfChannel, trio.BrokenResourceError))
    assert ended_by is not None
