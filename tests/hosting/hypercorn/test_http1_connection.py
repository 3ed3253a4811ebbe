"""Connections on HTTP/1.1: requests one after the other, bodies, ends, and clients that do as they like."""

import gc
import os
import socket
import ssl
import struct
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
import trio
import trio.testing
import trustme
from hypercorn.config import Config

from service.hosting.hypercorn import http1_connection
from service.hosting.hypercorn.connections import Connection, Connections
from service.hosting.hypercorn.http1_connection import DISCARDED_BYTES_MAX, ServerFields
from service.hosting.hypercorn.request_parser import RequestParser
from tests.hosting.conftest import PATIENT_S, Serve, Served

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSING = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
CAP_S = 20
BIG_BYTES = 8 * 1024 * 1024
"""More than the kernel takes for a client that does not read."""
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class App:
    """A bare ASGI application; its answers are chosen by the path."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes | None] = []
        self.begun = trio.Event()
        self.go_on = trio.Event()
        self.ended = trio.Event()
        self.after: list[dict[str, Any]] = []

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("not supported")
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.send", "text": "hello"})
            return
        self.scopes.append(scope)
        self.begun.set()
        try:
            await getattr(self, scope["path"][1:].replace("-", "_") or "index")(receive, send)
        finally:
            self.ended.set()

    async def index(self, _: Receive, send: Send) -> None:
        await answer(send, b"here")

    async def echo(self, receive: Receive, send: Send) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.bodies.append(None)
                return
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        await answer(send, body)

    async def early(self, _: Receive, send: Send) -> None:
        await answer(send, b"no", status=413)

    async def late(self, _: Receive, send: Send) -> None:
        await self.go_on.wait()
        await answer(send, b"no", status=413)

    async def waiting(self, receive: Receive, send: Send) -> None:
        await receive()
        await self.go_on.wait()
        await answer(send, b"waited")

    async def until_disconnect(self, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await answer(send, b"for nobody")

    async def endless(self, _: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not self.go_on.is_set():
            await send({"type": "http.response.body", "body": b"." * 10_000, "more_body": True})
            await trio.lowlevel.checkpoint()

    async def stream(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await receive()
        if (await receive())["type"] == "http.disconnect":
            return
        raise AssertionError("there is nothing else to receive")

    async def asks_again(self, receive: Receive, send: Send) -> None:
        await answer(send, b"here")
        self.after = [await receive() for _ in range(4)]

    async def fails(self, _: Receive, send: Send) -> None:
        raise RuntimeError("not thought of")

    async def nothing(self, _: Receive, send: Send) -> None:
        pass

    async def fails_late(self, _: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        raise RuntimeError("not thought of")

    async def head_alone(self, _: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})

    async def too_long(self, _: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"four", "more_body": True})
        await send({"type": "http.response.body", "body": b"more"})

    async def too_short(self, _: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"four", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def big(self, _: Receive, send: Send) -> None:
        await answer(send, b"." * BIG_BYTES)

    async def last(self, _: Receive, send: Send) -> None:
        fields = [(b"content-length", b"%d" % BIG_BYTES), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": b"." * BIG_BYTES})

    async def goes_on(self, _: Receive, send: Send) -> None:
        await answer(send, b"no", status=413)
        await trio.sleep_forever()

    async def in_two_tasks(self, _: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with trio.open_nursery() as nursery:
            for byte in (b"a", b"b"):
                nursery.start_soon(
                    send, {"type": "http.response.body", "body": byte * BIG_BYTES, "more_body": True}
                )  # fmt: skip
        await send({"type": "http.response.body", "body": b""})

    async def impatient(self, _: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with trio.move_on_after(0.1):
            while True:
                await send({"type": "http.response.body", "body": b"." * 100_000, "more_body": True})
        await send({"type": "http.response.body", "body": b"more after a part of a piece"})


async def answer(send: Send, body: bytes, *, status: int = 200) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


def get(path: str, *fields: str) -> bytes:
    return "\r\n".join([f"GET /{path} HTTP/1.1", "Host: localhost", *fields, "", ""]).encode()


def post(path: str, length: int, *fields: str) -> bytes:
    return get(path, f"Content-Length: {length}", *fields).replace(b"GET", b"POST")


@pytest.fixture
def app() -> App:
    return App()


@asynccontextmanager
async def connected(serve: Serve, app: App, **config: Any) -> AsyncIterator[trio.SocketStream]:
    with trio.fail_after(CAP_S):
        async with serve(app, **config) as server, await server.connect() as client:
            yield client


async def rest_of(client: trio.abc.Stream) -> bytes:
    received = bytearray()
    while data := await client.receive_some(65536):
        received += data
    return bytes(received)


async def receive(client: trio.abc.Stream, ending: bytes) -> bytes:
    received = bytearray()
    while not received.endswith(ending):
        data = await client.receive_some(65536)
        assert data, received
        received += data
    return bytes(received)


def certificate(folder: Path) -> tuple[dict[str, str], ssl.SSLContext]:
    """The server's configuration for TLS, and a client's context for it."""
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return {"certfile": str(folder / "both.pem"), "keyfile": str(folder / "both.pem")}, context


async def reset(client: trio.SocketStream) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await trio.aclose_forcefully(client)


async def is_gone(connections: Connections) -> bool:
    with trio.move_on_after(PATIENT_S):
        await connections.wait_none_open()
        return True
    return False


# Requests


async def test_a_thousand_requests_at_once_are_answered_in_order(
    serve: Serve, connections: Connections, app: App
) -> None:
    requests = b"".join(post("echo", 4) + b"%04d" % number for number in range(1000))
    async with connected(serve, app, keep_alive_max_requests=2000) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, requests + CLOSING)
        received = await rest_of(client)
    answers = received.split(b"HTTP/1.1 200 \r\n")
    assert [it[-4:] for it in answers[1:]] == [b"%04d" % number for number in range(1000)] + [b"here"]


async def test_the_next_request_waits_for_the_response_to_the_one_before(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with connected(serve, app) as client:
        await client.send_all(get("waiting") + GET)
        await app.begun.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(app.scopes) == 1
        app.go_on.set()
        assert (await receive(client, b"here")).index(b"waited") > 0


@pytest.mark.parametrize("pause_s", [0, 0.002])
async def test_a_request_that_comes_byte_by_byte_is_answered(
    serve: Serve, connections: Connections, app: App, pause_s: float
) -> None:
    async with connected(serve, app) as client:
        for byte in post("echo", 3):
            await client.send_all(bytes([byte]))
            await trio.sleep(pause_s)
        await client.send_all(b"a")
        await client.send_all(b"bc")
        assert (await receive(client, b"abc")).startswith(b"HTTP/1.1 200")


async def test_line_ends_after_a_request_do_not_hide_a_client_that_leaves(
    serve: Serve, connections: Connections, app: App
) -> None:
    for more in (b"\r\n", b"\n", b"\r"):
        async with connected(serve, app) as client:
            app.ended = trio.Event()
            await client.send_all(get("stream") + more)
            await receive(client, b"first\r\n")
            await reset(client)
            with trio.fail_after(PATIENT_S):
                await app.ended.wait()


async def test_a_client_that_has_asked_ahead_and_leaves_is_noticed_when_it_is_written_to(
    serve: Serve, connections: Connections
) -> None:
    class Patient(App):
        async def patient(self, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"." * 1000, "more_body": True})
                with trio.move_on_after(0.001):
                    assert (await receive())["type"] == "http.disconnect"
                    return

    app = Patient()
    async with connected(serve, app) as client:
        await client.send_all(get("patient") + GET)
        await client.receive_some(1000)
        await trio.aclose_forcefully(client)
        with trio.fail_after(PATIENT_S):
            await app.ended.wait()
        assert await is_gone(connections)


@pytest.mark.parametrize(
    "request_",
    [
        GET,
        get("%61?a=%20b", "X-A: 1", "x-a: 2", "Cookie: c").replace(b"/%61", b"/%69ndex"),
        GET.replace(b"1.1", b"1.0"),
        GET.replace(b"GET", b"get"),
        b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n".replace(b"http://localhost", b""),
    ],
)
async def test_the_scope_is_the_one_of_hypercorn(serve: Serve, request_: bytes) -> None:
    scopes: list[dict[str, Any]] = []
    for ours in (False, True):
        app = App()
        async with serve(app) as server:
            with trio.fail_after(CAP_S):
                if ours:
                    await ask_ours(app, server, request_)
                else:
                    async with await server.connect() as client:
                        await client.send_all(request_)
                        await receive(client, b"here")
        scope = app.scopes[0]
        assert scope.pop("client")[0] == scope.pop("server")[0] == "127.0.0.1"
        scopes.append({key: value for key, value in scope.items() if not key.startswith("lastcall")})
    assert scopes[0] == scopes[1]
    assert list(scopes[0]) == list(scopes[1])


async def ask_ours(app: App, server: Served, request_: bytes) -> None:
    """Ask a connection of ours for the same application."""
    from hypercorn.app_wrappers import ASGIWrapper
    from hypercorn.trio.worker_context import WorkerContext
    from hypercorn.typing import ConnectionState

    from service.stop_state import StopState

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    connections = Connections(StopState())
    config = Config.from_mapping(errorlog=None)

    async def handle(stream: trio.SocketStream) -> None:
        wrapped = ASGIWrapper(app)  # type: ignore[arg-type]
        await connections.open(wrapped, config, WorkerContext(None), ConnectionState({}), stream).run()  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, [listener])
        async with await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]) as client:
            await client.send_all(request_)
            await receive(client, b"here")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("more", [b"\r\n", b"garbage\r\n\r\n", GET])
async def test_what_follows_the_last_request_of_a_client_is_not_read(
    serve: Serve, connections: Connections, app: App, more: bytes
) -> None:
    async with connected(serve, app) as client:
        await client.send_all(CLOSING + more)
        received = await rest_of(client)
    assert received.endswith(b"here")
    assert received.count(b"HTTP/1.1") == len(app.scopes) == 1


async def test_a_request_for_another_host_is_refused_whatever_its_body_is(
    serve: Serve, connections: Connections, app: App
) -> None:
    chunks = post("echo", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"1\r\nx\r\n" * 100
    async with connected(serve, app, server_names=["elsewhere"]) as client:
        await client.send_all(chunks)
        assert (await rest_of(client)).startswith(b"HTTP/1.1 404")
    assert not app.scopes
    assert await is_gone(connections)


@pytest.mark.parametrize("method", [b"head", b"Head", b"gET", b"connect"])
async def test_a_connection_closes_after_a_method_that_is_none_for_others(
    serve: Serve, connections: Connections, app: App, method: bytes
) -> None:
    """Methods have case: for a proxy ``head`` is no ``HEAD``, so the next answer would be the body of this one."""
    async with connected(serve, app) as client:
        await client.send_all(GET.replace(b"GET", method) + GET)
        received = await rest_of(client)
    assert received.count(b"HTTP/1.1") == len(app.scopes) == 1
    assert b"connection: close" in received.lower()


async def test_a_connection_closes_after_a_request_with_two_framings(
    serve: Serve, connections: Connections, app: App
) -> None:
    """RFC 9112, 6.1: another server on the way may have taken the other one, and what follows for the body."""
    async with connected(serve, app) as client:
        await client.send_all(post("echo", 4, "Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n\r\n" + GET)
        received = await rest_of(client)
    assert received.endswith(b"x")
    assert received.count(b"HTTP/1.1") == len(app.scopes) == 1
    assert b"connection: close" in received.lower()


# Responses


async def test_head_and_body_are_one_write(
    serve: Serve, connections: Connections, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    write = os.write

    def note(descriptor: int, data: bytes) -> int:
        if data.startswith(b"HTTP") or data.endswith(b"here"):
            written.append(bytes(data))
        return write(descriptor, data)

    async with connected(serve, app) as client:
        monkeypatch.setattr(os, "write", note)
        await client.send_all(GET)
        received = await receive(client, b"here")
    assert written == [received]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("fails", (b"HTTP/1.1 500 \r\ncontent-length: 0\r\nconnection: close\r\n", b"")),
        ("nothing", (b"HTTP/1.1 500 \r\ncontent-length: 0\r\nconnection: close\r\n", b"")),
        ("head-alone", (b"HTTP/1.1 500 \r\ncontent-length: 0\r\nconnection: close\r\n", b"")),
        ("fails-late", (b"HTTP/1.1 200 \r\n", b"5\r\nfirst\r\n")),
        ("too-long", (b"HTTP/1.1 200 \r\ncontent-length: 4\r\n", b"four")),
        ("too-short", (b"HTTP/1.1 200 \r\ncontent-length: 10\r\n", b"four")),
    ],
)
async def test_an_application_that_fails_ends_its_connection(
    serve: Serve, connections: Connections, app: App, path: str, expected: tuple[bytes, bytes]
) -> None:
    async with connected(serve, app) as client:
        await client.send_all(get(path) + GET)
        received = await rest_of(client)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(expected[0])
    assert body == expected[1]


async def test_a_send_that_is_cancelled_ends_the_connection(serve: Serve, connections: Connections, app: App) -> None:
    async with connected(serve, app) as client:
        await client.send_all(get("impatient") + GET)
        await app.ended.wait()
        received = await rest_of(client)
        assert b"more after" not in received
        assert received.count(b"HTTP/1.1") == 1
    assert await is_gone(connections)


async def test_after_the_response_receive_tells_of_a_disconnect_as_often_as_it_is_asked(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with connected(serve, app) as client:
        await client.send_all(get("asks-again"))
        await receive(client, b"here")
        await app.ended.wait()
        await client.send_all(GET)
        await receive(client, b"here")
    assert [it["type"] for it in app.after] == ["http.request", *["http.disconnect"] * 3]


async def test_what_is_sent_to_a_client_that_has_left_is_dropped(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with connected(serve, app) as client:
        await client.send_all(get("until-disconnect"))
        await app.begun.wait()
        await reset(client)
        await app.ended.wait()
        assert await is_gone(connections)


async def test_the_last_response_of_a_connection_says_so(serve: Serve, connections: Connections, app: App) -> None:
    async with connected(serve, app, keep_alive_max_requests=2) as client:
        await client.send_all(3 * GET)
        first, last = (await rest_of(client)).split(b"HTTP/1.1 200 \r\n")[1:]
    assert b"connection: close" not in first
    assert b"connection: close" in last


@pytest.mark.parametrize("path", ["big", "last"])
async def test_no_answer_is_lost_by_a_close_that_the_server_chose(
    serve: Serve, connections: Connections, app: App, path: str
) -> None:
    """The client has sent its next request before it could read that this answer is the last."""
    async with connected(serve, app, keep_alive_max_requests=1 if path == "big" else 1000) as client:
        await client.send_all(get(path))
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def go_on_asking() -> None:
                await app.ended.wait()
                for _ in range(10):
                    await client.send_all(GET)

            received = await rest_of(client)
        assert len(received.partition(b"\r\n\r\n")[2]) == BIG_BYTES
        assert b"connection: close" in received[:1000].lower()
        await client.send_eof()
        assert await is_gone(connections)


async def test_a_client_that_keeps_to_the_last_answer_of_each_connection_loses_no_request(
    serve: Serve, connections: Connections, app: App
) -> None:
    answered = asked = connected_ = 0
    async with serve(app, keep_alive_max_requests=7) as server:
        with trio.fail_after(CAP_S):
            while answered < 100:
                async with await server.connect() as client:
                    connected_ += 1
                    closes = False
                    while not closes and answered < 100:
                        ahead = min(3, 100 - answered)
                        await client.send_all(ahead * GET)
                        asked += ahead
                        for _ in range(ahead):
                            head = await receive_one(client)
                            answered += 1
                            closes = b"connection: close" in head
                            if closes:
                                break
                    if closes:
                        assert await rest_of(client) == b""  # an end, and no reset
    assert len(app.scopes) == answered == 100  # what was asked ahead of an end is asked again, and was not done
    assert asked > answered
    assert connected_ == -(-100 // 7)


async def receive_one(client: trio.SocketStream) -> bytes:
    """Read one answer of the index, byte by byte, and leave the next one."""
    received = b""
    while not received.endswith(b"here"):
        data = await client.receive_some(1)
        assert data, received
        received += data
    return received


async def test_pieces_of_two_tasks_stay_whole(serve: Serve, connections: Connections, app: App) -> None:
    async with connected(serve, app) as client:
        await client.send_all(get("in-two-tasks"))
        received = await receive(client, b"0\r\n\r\n")
        await client.send_all(GET)
        await receive(client, b"here")
    framed = [b"%x\r\n%b\r\n" % (BIG_BYTES, byte * BIG_BYTES) for byte in (b"a", b"b")]
    assert received.partition(b"\r\n\r\n")[2] in (
        framed[0] + framed[1] + b"0\r\n\r\n", framed[1] + framed[0] + b"0\r\n\r\n"
    )  # fmt: skip


def test_the_server_s_fields_are_made_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr("hypercorn.config.time", lambda: now)
    fields = ServerFields(Config())
    first = fields.current()
    assert first == [(b"date", b"Mon, 12 Jan 1970 13:46:40 GMT"), (b"server", b"hypercorn-h11")]
    now += 0.9
    assert fields.current() is first
    now += 0.2
    assert fields.current() == [(b"date", b"Mon, 12 Jan 1970 13:46:41 GMT"), (b"server", b"hypercorn-h11")]


# Bodies


async def test_a_client_that_waits_to_be_told_to_go_on_is_told(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with connected(serve, app) as client:
        await client.send_all(post("echo", 2, "Expect: 100-continue"))
        interim = await receive(client, b"\r\n\r\n")
        assert interim.startswith(b"HTTP/1.1 100 \r\ndate: ")
        await client.send_all(b"ab")
        assert (await receive(client, b"ab")).startswith(b"HTTP/1.1 200")


async def test_a_client_that_is_still_sending_gets_the_early_answer_and_then_the_end(
    serve: Serve, connections: Connections, app: App
) -> None:
    size = DISCARDED_BYTES_MAX // 2
    async with connected(serve, app) as client:
        await client.send_all(post("early", size))
        received = await rest_of(client)
        assert received.endswith(b"no")
        assert b"connection: close" in received.lower()
        for _ in range(8):
            await client.send_all(b"." * (size // 8))
        await client.send_all(GET)
        await client.send_eof()
        assert await is_gone(connections)
    assert len(app.scopes) == 1


@pytest.mark.parametrize("max_requests", [None, 100])
async def test_a_body_that_comes_with_its_head_leaves_the_connection_open(
    serve: Serve, connections: Connections, app: App, max_requests: int | None
) -> None:
    async with connected(serve, app, max_requests=max_requests) as client:
        await client.send_all(post("early", 2000) + b"." * 2000 + GET)
        received = await receive(client, b"here")
    assert b"connection: close" not in received.lower()
    assert len(app.scopes) == 2


async def test_under_tls_too_a_client_that_is_still_sending_gets_the_early_answer_and_then_the_end(
    serve: Serve, connections: Connections, app: App, tmp_path: Path
) -> None:
    files, context = certificate(tmp_path)
    async with connected(serve, app, **files) as plain:
        client = trio.SSLStream(plain, context, server_hostname="localhost", https_compatible=True)
        await client.send_all(post("early", 100_000))
        received = await rest_of(client)
        assert received.endswith(b"no")
        assert b"connection: close" in received.lower()
        for _ in range(8):
            await plain.send_all(b"." * 10_000)  # a closed connection would be reset by the first of them
        await plain.send_eof()
        assert await is_gone(connections)


async def test_a_client_that_is_still_sending_when_the_server_stops_gets_its_answer_and_then_the_end(
    serve: Serve, connections: Connections, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1_connection, "STOP_LINGER_S", CAP_S)
    async with serve(app, keep_alive_timeout=60, graceful_timeout=60) as server:
        with trio.fail_after(CAP_S):
            async with await server.connect() as client:
                await client.send_all(post("late", 100_000))
                await app.begun.wait()
                connections.close_idle(grace_s=0)
                server.stop.set()
                app.go_on.set()
                assert (await rest_of(client)).endswith(b"no")
                for _ in range(8):
                    await client.send_all(b"." * 10_000)
            await server.gone.wait()


async def test_a_client_that_goes_on_sending_does_not_hold_the_stop(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with serve(app, keep_alive_timeout=60, graceful_timeout=60) as server:
        with trio.fail_after(CAP_S):
            async with await server.connect() as client:
                await client.send_all(post("late", 100_000))
                await app.begun.wait()
                connections.close_idle(grace_s=0)
                server.stop.set()
                app.go_on.set()
                await server.gone.wait()


async def test_an_application_that_reads_no_body_holds_no_connection(
    serve: Serve, connections: Connections, app: App
) -> None:
    """The connection's reader waits for room for the body, which the application leaves to it."""
    async with connected(serve, app) as client:
        await client.send_all(post("late", DISCARDED_BYTES_MAX // 2))
        await client.send_all(b"." * (DISCARDED_BYTES_MAX // 4))
        await trio.testing.wait_all_tasks_blocked(0.05)
        app.go_on.set()
        assert (await rest_of(client)).endswith(b"no")
        await client.send_eof()
        assert await is_gone(connections)


async def test_a_client_that_goes_on_sending_after_the_early_answer_is_cut(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with connected(serve, app) as client:
        await client.send_all(post("early", 1 << 30))
        assert (await rest_of(client)).endswith(b"no")
        with pytest.raises(trio.BrokenResourceError):
            await client.send_all(b"." * (1 << 26))
        assert await is_gone(connections)


async def test_a_client_that_stops_sending_after_the_early_answer_is_closed(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with connected(serve, app, keep_alive_timeout=0.1) as client:
        await client.send_all(post("early", 100))
        assert (await rest_of(client)).endswith(b"no")
        assert await is_gone(connections)


async def test_a_body_that_breaks_its_framing_is_refused_unless_the_answer_has_begun(
    serve: Serve, connections: Connections, app: App
) -> None:
    head = post("echo", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    async with connected(serve, app) as client:
        await client.send_all(head + b"3\r\nabc\r\n")
        await app.begun.wait()
        await client.send_all(b"zz\r\n")
        assert (await rest_of(client)).startswith(b"HTTP/1.1 400")
    assert app.bodies == [None]
    assert await is_gone(connections)


async def test_an_application_that_goes_on_after_its_early_answer_and_reads_nothing_holds_no_connection(
    serve: Serve, connections: Connections, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection's reader waits for room for the body, and the client's bytes stay unread."""
    monkeypatch.setattr(http1_connection, "UNREAD_POLLS_MAX", 5)
    async with connected(serve, app, keep_alive_timeout=0.05, max_app_queue_size=1) as client:
        with suppress(trio.BrokenResourceError):
            await client.send_all(post("goes-on", DISCARDED_BYTES_MAX // 2) + b"." * (DISCARDED_BYTES_MAX // 2))
        assert await is_gone(connections)
        await app.ended.wait()


@pytest.mark.parametrize(
    ("sent", "config"),
    [
        (post("echo", 2, "Expect: 100-continue"), {}),
        (GET, {"server_names": ["elsewhere"]}),
        (post("echo", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"zz\r\n", {}),
        (b"garbage\r\n\r\n", {}),
    ],
)
async def test_a_client_that_reads_no_answer_of_the_connection_itself_holds_no_connection(
    serve: Serve, connections: Connections, app: App, sent: bytes, config: dict[str, Any]
) -> None:
    async with connected(serve, app, keep_alive_timeout=0.2, **config) as client:
        while not connections.any_open:  # noqa: ASYNC110  nothing tells of it
            await trio.sleep(0.001)
        [connection] = connections._open
        with suppress(BlockingIOError):
            while True:
                os.write(connection.socket.fileno(), b"." * 65536)
        await client.send_all(sent)
        assert await is_gone(connections)


# Ends


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\n", GET, GET + b"GET / HTTP/1.1\r\n"])
async def test_a_connection_without_a_whole_head_is_idle(
    serve: Serve, connections: Connections, app: App, begin: bytes
) -> None:
    async with connected(serve, app, keep_alive_timeout=0.2) as client:
        if begin:
            await client.send_all(begin)
        received = await rest_of(client)
        assert received.count(b"HTTP/1.1 200") == begin.count(GET)
        assert await is_gone(connections)


async def test_the_idle_time_counts_from_the_last_response(
    serve: Serve, connections: Connections, app: App, mock_clock: trio.testing.MockClock
) -> None:
    async with connected(serve, app, keep_alive_timeout=4) as client:
        for _ in range(4):
            mock_clock.jump(2)
            await client.send_all(GET)
            assert (await receive(client, b"here")).startswith(b"HTTP/1.1 200")
        mock_clock.jump(4)
        assert await rest_of(client) == b""


async def test_a_request_that_takes_longer_than_the_idle_time_is_answered(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with connected(serve, app, keep_alive_timeout=0.05) as client:
        await client.send_all(get("waiting"))
        await trio.sleep(0.3)
        app.go_on.set()
        assert (await rest_of(client)).endswith(b"waited")


async def test_a_stop_closes_idle_connections_at_once(serve: Serve, connections: Connections, app: App) -> None:
    async with serve(app, keep_alive_timeout=60, graceful_timeout=60) as server:
        with trio.fail_after(CAP_S):
            async with await server.connect() as fresh, await server.connect() as idle, await server.connect() as busy:
                await busy.send_all(get("waiting"))
                await app.begun.wait()
                await idle.send_all(GET)
                await receive(idle, b"here")
                server.stop.set()
                assert await rest_of(idle) == await rest_of(fresh) == b""
                assert not server.gone.is_set()
                app.go_on.set()
                assert (await rest_of(busy)).endswith(b"waited")
                await server.gone.wait()


async def test_idle_connections_that_are_kept_again_have_their_idle_time_again(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with connected(serve, app) as client:
        await client.send_all(get("waiting"))
        await app.begun.wait()
        connections.close_idle(grace_s=0)
        await trio.testing.wait_all_tasks_blocked()
        connections.keep_idle()
        app.go_on.set()
        await receive(client, b"waited")
        await trio.testing.wait_all_tasks_blocked()
        await client.send_all(GET)
        assert (await receive(client, b"here")).startswith(b"HTTP/1.1 200")


async def test_a_head_that_has_arrived_and_is_read_in_many_steps_is_answered(
    serve: Serve,
    connections: Connections,
    app: App,
    mock_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The idle time is over meanwhile, as after a freeze, and the kernel has no byte of the head any more."""
    pieces: list[bytes] = []
    receive_data = RequestParser.receive_data

    def receive_late(parser: RequestParser, piece: bytes) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            mock_clock.jump(3)
        receive_data(parser, piece)

    monkeypatch.setattr(RequestParser, "receive_data", receive_late)
    monkeypatch.setattr(http1_connection, "HEAD_PIECE_BYTES", 4)
    monkeypatch.setattr(http1_connection, "STEP_S", -1)
    async with connected(serve, app, keep_alive_timeout=2) as client:
        await client.send_all(GET)
        assert (await receive(client, b"here")).startswith(b"HTTP/1.1 200")


async def test_a_request_that_is_on_its_way_when_the_server_stops_is_answered(
    serve: Serve, connections: Connections, app: App
) -> None:
    async with serve(app, keep_alive_timeout=60, graceful_timeout=60) as server:
        with trio.fail_after(CAP_S):
            async with await server.connect() as kept:
                await kept.send_all(GET)
                await receive(kept, b"here")
                os.write(kept.socket.fileno(), GET)  # no checkpoint: the server reads it after the stop
                server.stop.set()
                assert (await rest_of(kept)).endswith(b"here")
                await server.gone.wait()


async def test_a_connection_that_has_ended_is_freed_at_once(
    serve: Serve, connections: Connections, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed, aborted or cancelled: without circles it does not wait for the garbage collection."""
    seen: list[weakref.ref[Connection]] = []
    run = Connection.run

    async def noted(connection: Connection) -> None:
        seen.append(weakref.ref(connection))
        await run(connection)

    monkeypatch.setattr(Connection, "run", noted)
    gc.collect()
    gc.disable()
    try:
        async with serve(app) as server:
            with trio.fail_after(CAP_S):
                async with await server.connect() as client:
                    await client.send_all(CLOSING)
                    await rest_of(client)
                for end in (connections.abort_all, None):
                    async with await server.connect() as client:
                        app.begun = trio.Event()
                        await client.send_all(get("waiting"))
                        await app.begun.wait()
                        if end is None:
                            break  # the server's nursery is cancelled
                        end()
                        assert await is_gone(connections)
        assert [it() for it in seen] == [None] * 3
    finally:
        gc.enable()


async def test_a_connection_that_is_aborted_ends_its_request(serve: Serve, connections: Connections, app: App) -> None:
    async with connected(serve, app) as client:
        await client.send_all(get("waiting"))
        await app.begun.wait()
        assert connections.abort_all() == 1
        await app.ended.wait()
        assert await is_gone(connections)


# Other protocols


KEY = "Sec-WebSocket-Key: " + "a" * 22 + "=="
WEBSOCKET = get("", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", KEY)


@pytest.mark.parametrize("before", [0, 2])
async def test_a_websocket_may_follow_requests(serve: Serve, connections: Connections, app: App, before: int) -> None:
    async with connected(serve, app) as client:
        await client.send_all(before * GET + WEBSOCKET)
        received = await rest_of(client)
    assert b"hello" in received
    assert received.count(b"HTTP/1.1 200") == before
    assert b"HTTP/1.1 101 " in received


@pytest.mark.parametrize("piece_bytes", [1, 10, 10_000])
async def test_http_2_may_be_spoken_at_once_in_any_pieces(
    serve: Serve, connections: Connections, app: App, piece_bytes: int
) -> None:
    connection = h2.connection.H2Connection(h2.config.H2Configuration())
    connection.initiate_connection()
    pseudo = [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", "localhost")]
    connection.send_headers(1, [*pseudo, ("a", "~" * 5000)], end_stream=True)
    data = connection.data_to_send()
    async with connected(serve, app) as client:
        for start in range(0, len(data), piece_bytes):
            await client.send_all(data[start : start + piece_bytes])
            await trio.lowlevel.checkpoint()
        body = b""
        while body != b"here":
            for event in connection.receive_data(bytes(await client.receive_some())):
                if isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
    assert [it["http_version"] for it in app.scopes] == ["2"]


async def test_requests_under_tls_are_answered(
    serve: Serve, connections: Connections, app: App, tmp_path: Path
) -> None:
    files, context = certificate(tmp_path)
    async with connected(serve, app, **files) as plain:
        client = trio.SSLStream(plain, context, server_hostname="localhost", https_compatible=True)
        await client.send_all(3 * (post("echo", 3) + b"abc"))
        received = b""
        while received.count(b"HTTP/1.1 200") < 3:
            received += await client.receive_some()
        await client.send_all(CLOSING)
        assert (await rest_of(client)).endswith(b"here")
    assert app.scopes[0]["scheme"] == "https"
