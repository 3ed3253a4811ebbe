"""Answers that their clients do not read, on real sockets: given up after a number of looks without progress."""

import gc
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import trio
import trio.testing
import trustme
from hypercorn.protocol.h2 import StreamBuffer
from quart import Quart, request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from service.api.http.event_stream import ENDS_UNREAD
from service.api.http.request_body import BoundedRequest
from service.hosting.hypercorn import asgi_request
from service.hosting.hypercorn.asgi_request import PIECE_BYTES, AsgiRequest
from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.unread_answers import (
    BYTES_A_SECOND_MIN,
    LOOKS,
    Answer,
    UnreadAnswers,
    watch_unread_answers,
)
from tests.hosting.conftest import BRIEF_S, Serve, Served

SIZE = 12 * 1024 * 1024
"""More than the kernel takes for a client that does not read."""
SMALL = 5000
ENDLESS_BEGINNING = 16 * 1024
"""More than the kernel of such a client takes, and less than the server's."""
WINDOW = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE


class App(QuartTrio):
    """An application with a large answer, a small one, and an event stream that is as large."""

    request_class = BoundedRequest

    def __init__(self, *, timeout_s: float = 0.01) -> None:
        super().__init__("test")
        self.asgi_http_class = AsgiRequest
        self.config["RESPONSE_TIMEOUT"] = None
        self.unread = watch_unread_answers(self, timeout_s=timeout_s)
        self.held: list[weakref.ref[TrioResponse]] = []
        self.begun = 0
        self.ended = 0
        self.route("/large")(self.large)
        self.route("/small")(self.small)
        self.route("/stream")(self.stream)
        self.route("/endless")(self.endless)
        self.tick = trio.lowlevel.ParkingLot()

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += scope["type"] == "http"
        try:
            await super().asgi_app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self.ended += 1

    async def large(self) -> TrioResponse:
        answer = TrioResponse(b"x" * SIZE, content_type="application/json")
        self.held.append(weakref.ref(answer))
        return answer

    async def small(self) -> TrioResponse:
        return TrioResponse(b"y" * SMALL, content_type="application/json")

    async def stream(self) -> TrioResponse:
        async def body() -> AsyncIterator[bytes]:
            for _ in range(SIZE // PIECE_BYTES):
                yield b"z" * PIECE_BYTES

        return TrioResponse(body(), content_type="text/event-stream")

    async def endless(self) -> TrioResponse:
        """An event stream that need not wait for its client, with a small piece at each tick."""
        cast("dict[str, Any]", request.scope)[ENDS_UNREAD] = True

        async def body() -> AsyncIterator[bytes]:
            yield b"z" * ENDLESS_BEGINNING
            while True:
                await self.tick.park()
                yield b": tick\n\n"

        return TrioResponse(body(), content_type="text/event-stream")

    async def is_blocked(self) -> None:
        """Return once no request can go on without its client."""
        await trio.testing.wait_all_tasks_blocked(0.1)

    def held_answers(self) -> int:
        gc.collect()
        return sum(answer() is not None for answer in self.held)


def look(unread: UnreadAnswers, times: int) -> int:
    return sum(unread.look() for _ in range(times))


def a_context(path: Path) -> tuple[ssl.SSLContext, dict[str, str]]:
    """A client's context, and the server's files."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_and_cert_chain_pem.write_to_path(path / "both.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context, {"certfile": str(path / "both.pem"), "keyfile": str(path / "both.pem")}


async def connect(server: Served, context: ssl.SSLContext | None = None, *, http2: bool = False) -> trio.abc.Stream:
    """A client whose kernel takes few bytes."""
    client = trio.socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await client.connect(("127.0.0.1", server.port))
    stream: trio.abc.Stream = trio.SocketStream(client)
    if context is not None:
        if http2:
            context.set_alpn_protocols(["h2"])
        stream = trio.SSLStream(stream, context, server_hostname="localhost", https_compatible=True)
    return stream


def buffers_of(answer: Answer) -> Iterable[StreamBuffer]:
    assert answer._stream is not None
    return answer._stream._protocol.stream_buffers.values()


async def ask(stream: trio.abc.Stream, path: str) -> None:
    await stream.send_all(b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())


async def ask_until_closed(stream: trio.abc.Stream, requests: bytes) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await stream.send_all(requests)


class Http2Client:
    """A client of HTTP/2 that grants no window by itself."""

    def __init__(self, stream: trio.abc.Stream, *, window: int) -> None:
        self._stream = stream
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration())
        self.connection.initiate_connection()
        self.connection.update_settings({WINDOW: window})
        self.received: dict[int, int] = {}
        self.reset: set[int] = set()

    async def ask(self, path: str) -> int:
        stream_id = self.connection.get_next_available_stream_id()
        pseudo = [(":method", "GET"), (":path", f"/{path}"), (":scheme", "http"), (":authority", "localhost")]
        self.connection.send_headers(stream_id, pseudo, end_stream=True)
        await self.flush()
        return stream_id

    async def flush(self) -> None:
        await self._stream.send_all(self.connection.data_to_send())

    async def receive(self) -> bool:
        """Take what has arrived. Returns False at the end of the connection."""
        data = await self._stream.receive_some(65536)
        for event in self.connection.receive_data(bytes(data)):
            if isinstance(event, h2.events.DataReceived):
                assert event.stream_id is not None
                assert event.data is not None
                self.received[event.stream_id] = self.received.get(event.stream_id, 0) + len(event.data)
            if isinstance(event, h2.events.StreamReset):
                assert event.stream_id is not None
                self.reset.add(event.stream_id)
        await self.flush()
        return bool(data)


@pytest.fixture
def app() -> App:
    return App()


@pytest.mark.parametrize("secure", [False, True])
async def test_an_answer_that_is_not_read_is_given_up_and_its_memory_is_free(
    serve: Serve, connections: Connections, app: App, tmp_path: Path, secure: bool
) -> None:
    context, files = a_context(tmp_path) if secure else (None, {})
    async with serve(app, **files) as server:
        with trio.fail_after(20):
            stalled = await connect(server, context)
            await ask(stalled, "large")
            await app.is_blocked()
            assert (look(app.unread, LOOKS), app.held_answers()) == (0, 1)
            assert look(app.unread, 1) == 1
            await app.is_blocked()
            assert (app.ended, app.held_answers(), repr(app.unread)) == (1, 0, "<UnreadAnswers: 0 on their way>")
            received = 0
            with suppress(trio.BrokenResourceError):
                while data := await stalled.receive_some(65536):
                    received += len(data)
            assert received < SIZE
            other = await connect(server, context)
            await ask(other, "small")
            assert bytes(await other.receive_some(4096)).startswith(b"HTTP/1.1 200")
            for client in (stalled, other):
                await trio.aclose_forcefully(client)


async def test_an_answer_whose_head_does_not_reach_its_client_is_given_up(
    serve: Serve, connections: Connections, app: App
) -> None:
    """Answers without a body fill what the kernel takes, until a head blocks."""
    async with serve(app) as server:
        with trio.fail_after(20):
            stalled = await connect(server)
            async with stalled, trio.open_nursery() as nursery:
                nursery.start_soon(ask_until_closed, stalled, b"HEAD /small HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
                begun = -1
                while begun != app.begun:
                    begun = app.begun
                    await app.is_blocked()
                assert app.begun == app.ended + 1
                [answer] = app.unread._answers
                assert answer.pieces == 1, "the head was taken, and is blocked with the end"
                assert (look(app.unread, LOOKS), app.begun - app.ended) == (0, 1)
                assert look(app.unread, 1) == 1
                await app.is_blocked()
                assert (app.begun - app.ended, repr(app.unread)) == (0, "<UnreadAnswers: 0 on their way>")


@pytest.mark.parametrize("secure", [False, True])
async def test_an_answer_that_is_read_slowly_arrives(
    serve: Serve, connections: Connections, app: App, tmp_path: Path, secure: bool
) -> None:
    """There are many looks between two pieces that the kernel takes: what the client takes is what counts."""
    context, files = a_context(tmp_path) if secure else (None, {})
    async with serve(app, **files) as server:
        with trio.fail_after(60):
            stream = await connect(server, context)
            await ask(stream, "large")
            await app.is_blocked()
            taken_by_the_kernel = 0
            for _ in range(8 * LOOKS):
                assert await stream.receive_some(4096)
                await trio.testing.wait_all_tasks_blocked(0.01)
                before = {answer.pieces for answer in app.unread._answers}
                assert app.unread.look() == 0
                taken_by_the_kernel += before != {answer.pieces for answer in app.unread._answers}
            assert app.ended == 0
            await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("http2", [False, True])
async def test_an_answer_that_is_read_too_slowly_is_given_up_in_a_time_that_its_size_bounds(
    serve: Serve, connections: Connections, http2: bool
) -> None:
    """The client makes progress at each look."""
    seconds_a_look = 500
    app = App(timeout_s=seconds_a_look * LOOKS)
    async with serve(app) as server:
        with trio.fail_after(60):
            stream = await connect(server)
            client = Http2Client(stream, window=1000)
            answer = await client.ask("large") if http2 else 0
            if not http2:
                await ask(stream, "large")
            await app.is_blocked()
            looks = 0
            with suppress(trio.BrokenResourceError):
                while not app.ended:
                    if http2:
                        client.connection.increment_flow_control_window(1, answer)
                        await client.receive()
                    else:
                        await stream.receive_some(4096)
                    await trio.testing.wait_all_tasks_blocked(0.005)
                    looks += 1
                    if app.unread.look():
                        break
            await app.is_blocked()
            assert (app.ended, app.held_answers()) == (1, 0)
            assert LOOKS < looks <= LOOKS + 2 * SIZE / (BYTES_A_SECOND_MIN * seconds_a_look)
            await trio.aclose_forcefully(stream)


async def test_an_event_stream_that_is_not_read_waits(serve: Serve, connections: Connections, app: App) -> None:
    async with serve(app) as server:
        with trio.fail_after(20):
            stalled = await connect(server)
            await ask(stalled, "stream")
            await app.is_blocked()
            assert look(app.unread, 3 * LOOKS) == 0
            assert app.ended == 0
            await trio.aclose_forcefully(stalled)


@pytest.mark.parametrize("kind", ["http1", "http1 tls", "http2", "http2 tls"])
async def test_an_event_stream_that_loses_nothing_ends_unread_although_it_never_has_to_wait(
    serve: Serve, connections: Connections, app: App, tmp_path: Path, kind: str
) -> None:
    """Between the looks it writes, and the kernel or the window holds that back."""
    http2 = kind.startswith("http2")
    context, files = a_context(tmp_path) if kind.endswith("tls") else (None, {})
    async with serve(app, **files) as server:
        with trio.fail_after(20):
            stream = await connect(server, context, http2=http2)
            if http2:
                client = Http2Client(stream, window=1000)
                await client.ask("endless")
                while sum(client.received.values()) < 1000:
                    await client.receive()
            else:
                await ask(stream, "endless")
            await app.is_blocked()
            looks = given_up = 0
            while not given_up:
                app.tick.unpark_all()
                await trio.testing.wait_all_tasks_blocked(0.01)
                [answer] = app.unread._answers
                assert not answer._is_waiting
                given_up = app.unread.look()
                looks += 1
            assert LOOKS < looks <= 3 * LOOKS
            await app.is_blocked()
            assert (app.ended, len(app.tick), repr(app.unread)) == (1, 0, "<UnreadAnswers: 0 on their way>")
            await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("http2", [False, True])
async def test_an_event_stream_that_loses_nothing_goes_on_while_its_client_takes_a_little(
    serve: Serve, connections: Connections, app: App, http2: bool
) -> None:
    """At each look there is more that the client has not taken."""
    async with serve(app) as server:
        with trio.fail_after(20):
            stream = await connect(server)
            client = Http2Client(stream, window=1000)
            asked = await client.ask("endless") if http2 else 0
            if not http2:
                await ask(stream, "endless")
            await app.is_blocked()
            for _ in range(3 * LOOKS):
                for _ in range(100):
                    app.tick.unpark_all()
                    await trio.testing.wait_all_tasks_blocked()
                if http2:
                    client.connection.increment_flow_control_window(10, asked)
                    await client.flush()
                    await client.receive()
                else:
                    assert await stream.receive_some(100)
                    assert await stream.receive_some(4096)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert app.unread.look() == 0
            assert app.ended == 0
            await trio.aclose_forcefully(stream)


async def test_an_event_stream_that_loses_nothing_goes_on_while_it_is_read(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with serve(app) as server:
        with trio.fail_after(20):
            stream = await connect(server)
            await ask(stream, "endless")
            received = 0
            while received < ENDLESS_BEGINNING:
                received += len(await stream.receive_some(65536))
            await app.is_blocked()
            assert look(app.unread, 3 * LOOKS) == 0
            await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("secure", [False, True])
async def test_a_stream_of_http2_without_a_window_is_reset_and_the_others_go_on(
    serve: Serve, connections: Connections, app: App, tmp_path: Path, secure: bool
) -> None:
    context, files = a_context(tmp_path) if secure else (None, {})
    async with serve(app, **files) as server:
        with trio.fail_after(20):
            stream = await connect(server, context, http2=True)
            client = Http2Client(stream, window=1000)
            first, other = await client.ask("large"), await client.ask("large")
            events = await client.ask("stream")
            while set(client.received.values()) != {1000} or len(client.received) != 3:
                await client.receive()
            await app.is_blocked()
            assert (look(app.unread, LOOKS), app.held_answers()) == (0, 2)
            buffers = [it.buffer for answer in app.unread._answers for it in buffers_of(answer)]
            assert 0 < max(map(len, buffers)) <= PIECE_BYTES, "hypercorn has no copy of an answer"
            client.connection.increment_flow_control_window(1000, other)
            await client.flush()
            while client.received[other] < 2000:
                await client.receive()
            assert look(app.unread, 1) == 1
            while not client.reset:
                await client.receive()
            await app.is_blocked()
            assert (client.reset, app.ended, app.held_answers()) == ({first}, 1, 1)
            small = await client.ask("small")
            client.connection.increment_flow_control_window(SMALL, small)
            await client.flush()
            while client.received.get(small, 0) < SMALL:
                await client.receive()
            assert look(app.unread, LOOKS + 1) >= 1
            while other not in client.reset:
                await client.receive()
            assert events not in client.reset
            await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("stalls_by", ["the kernel", "the window"])
async def test_a_stream_that_is_not_read_does_not_end_a_connection_that_another_stream_is_read_from(
    serve: Serve, connections: Connections, app: App, stalls_by: str
) -> None:
    """The connection is full at each look, and moves between the looks."""
    async with serve(app) as server:
        with trio.fail_after(20):
            stream = await connect(server)
            client = Http2Client(stream, window=0)
            if stalls_by == "the kernel":
                client.connection.increment_flow_control_window(SIZE)
            unread, moving = await client.ask("large"), await client.ask("large")
            client.connection.increment_flow_control_window(SIZE, moving)
            await client.flush()
            if stalls_by == "the window":
                while client.received.get(moving, 0) < 65535:
                    await client.receive()
            await app.is_blocked()
            given_up = 0
            for _ in range(2 * LOOKS):
                if stalls_by == "the window":
                    client.connection.increment_flow_control_window(1000)
                    await client.flush()
                await client.receive()
                await trio.testing.wait_all_tasks_blocked(0.02)
                assert all(it.is_stalled_as_a_whole for it in connections._open)
                given_up += app.unread.look()
            assert given_up == 1
            while unread not in client.reset:
                client.connection.increment_flow_control_window(1000)
                await client.receive()
            assert (client.reset, app.ended) == ({unread}, 1)
            await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("window", [0, 1 << 20])
async def test_a_connection_of_http2_that_takes_nothing_ends(
    serve: Serve, connections: Connections, app: App, window: int
) -> None:
    """With a window of 0 all its streams are reset; with an empty window of the connection the connection ends."""
    async with serve(app, keep_alive_timeout=1) as server:
        with trio.fail_after(20):
            stream = await connect(server)
            client = Http2Client(stream, window=window)
            await client.flush()
            await app.is_blocked()
            for _ in range(5):
                await client.ask("large")
            await app.is_blocked()
            assert app.held_answers() == 5
            assert look(app.unread, LOOKS + 1) >= 1
            with suppress(trio.BrokenResourceError):
                while await client.receive():
                    pass
            await app.is_blocked()
            assert (app.ended, app.held_answers()) == (5, 0)
            assert len(client.reset) == (5 if window == 0 else 0)
            await trio.aclose_forcefully(stream)


async def requests_left_by_a_client_of_http2(serve: Serve, app: App) -> int:
    """The requests that go on after their client has left without reading their answers."""
    async with serve(app) as server:
        with trio.fail_after(20):
            stream = await connect(server)
            client = Http2Client(stream, window=0)
            for _ in range(3):
                await client.ask("small")
            await app.is_blocked()
            assert app.ended == 0
            await trio.aclose_forcefully(stream)
            await app.is_blocked()
            return 3 - app.ended


async def test_a_client_of_http2_that_leaves_leaves_no_request_behind(
    serve: Serve, connections: Connections, app: App
) -> None:
    assert await requests_left_by_a_client_of_http2(serve, app) == 0


@pytest.mark.removal
async def test_hypercorn_still_waits_for_a_client_of_http2_that_has_left(
    serve: Serve, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This test fails once hypercorn closes its buffers; then Connection._read_data need not do so."""
    monkeypatch.setattr(asgi_request, "LAST_SEND_TIMEOUT_S", BRIEF_S)  # so that the requests end after the test
    assert await requests_left_by_a_client_of_http2(serve, app) == 3


async def test_a_pause_between_two_pieces_is_not_the_client_s(serve: Serve, connections: Connections, app: App) -> None:
    release = trio.Event()

    @app.get("/slow")
    async def slow() -> TrioResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await release.wait()
            yield b"last"

        return TrioResponse(body(), content_type="application/json")

    async with serve(app) as server:
        with trio.fail_after(20):
            stream = await connect(server)
            await ask(stream, "slow")
            await app.is_blocked()
            assert look(app.unread, 3 * LOOKS) == 0
            release.set()
            received = b""
            while not received.endswith(b"last\r\n0\r\n\r\n"):
                received += await stream.receive_some(4096)
            await trio.aclose_forcefully(stream)


async def test_the_loop_looks_so_often_that_the_timeout_holds(autojump_clock: trio.testing.MockClock) -> None:
    unread = watch_unread_answers(Quart("test"), timeout_s=30)
    looks: list[float] = []

    def note() -> int:
        looks.append(trio.current_time())
        return 0

    unread.look = note  # type: ignore[method-assign]
    began_at = trio.current_time()
    with trio.move_on_after(31):
        await unread.run()
    assert [it - began_at for it in looks] == [7.5, 15, 22.5, 30]
