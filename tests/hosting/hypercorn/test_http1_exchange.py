"""Requests and responses on HTTP/1.1: a client sees the bytes that hypercorn would send, in fewer writes."""

import logging
import os
import socket
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import trio
import trio.testing
from quart.wrappers.response import DataBody
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from service.api.http.event_stream import LastPiece
from service.api.http.request_body import BoundedRequest
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.http1_exchange import Http1Exchange
from tests.hosting.conftest import Serve, Served

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSING = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
PIECES = [b"first", b"", "größer".encode(), b"x" * 300_000, b"the end"]
CHUNKED = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in PIECES if piece) + b"0\r\n\r\n"


@pytest.fixture(params=[True, False], ids=["last piece known", "last piece not known"])
def app(request: pytest.FixtureRequest) -> QuartTrio:
    app = QuartTrio("test")
    app.asgi_http_class = AsgiRequest
    app.request_class = BoundedRequest

    async def body() -> AsyncIterator[bytes]:
        for piece in PIECES[:-1]:
            yield piece
        yield LastPiece(PIECES[-1]) if request.param else PIECES[-1]

    @app.get("/")
    async def index() -> TrioResponse:
        return TrioResponse(body())

    return app


async def ask(server: Served, request: bytes) -> tuple[bytes, bytes]:
    with trio.fail_after(10):
        async with await server.connect() as stream:
            await stream.send_all(request)
            head, _, body = b"".join([part async for part in stream]).partition(b"\r\n\r\n")
            return head.lower(), body


async def test_the_pieces_arrive_as_chunks(serve: Serve, app: QuartTrio, connections: Connections) -> None:
    async with serve(app) as server:
        head, body = await ask(server, CLOSING)
    assert b"transfer-encoding: chunked" in head
    assert body == CHUNKED


async def test_hypercorn_would_send_the_same(serve: Serve, app: QuartTrio) -> None:
    async with serve(app) as server:
        assert (await ask(server, CLOSING))[1] == CHUNKED


async def test_the_connection_is_ready_for_the_next_request(
    serve: Serve, app: QuartTrio, connections: Connections
) -> None:
    async with serve(app) as server:
        _, body = await ask(server, GET + CLOSING)
    first, answer, second = body.partition(b"HTTP/1.1 200")
    assert first == CHUNKED
    assert answer
    assert second.endswith(CHUNKED)


async def test_a_client_that_knows_no_chunks_gets_none(serve: Serve, app: QuartTrio, connections: Connections) -> None:
    async with serve(app) as server:
        head, body = await ask(server, GET.replace(b"1.1", b"1.0"))
    assert b"transfer-encoding" not in head
    assert body == b"".join(PIECES)


async def test_the_answer_to_a_head_request_has_no_body(serve: Serve, app: QuartTrio, connections: Connections) -> None:
    async with serve(app) as server:
        head, body = await ask(server, CLOSING.replace(b"GET", b"HEAD"))
    assert head.startswith(b"http/1.1 200")
    assert body == b""


async def writes_of_a_short_stream(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    app = QuartTrio("test")
    app.asgi_http_class = AsgiRequest
    app.request_class = BoundedRequest
    written: list[bytes] = []
    write = os.write

    async def body() -> AsyncIterator[bytes]:
        yield LastPiece(b"all")

    @app.get("/")
    async def index() -> TrioResponse:
        return TrioResponse(body())

    def note(descriptor: int, data: bytes) -> int:
        written.append(bytes(data))
        return write(descriptor, data)

    async with serve(app) as server:
        monkeypatch.setattr(os, "write", note)
        await ask(server, CLOSING)
        monkeypatch.setattr(os, "write", write)
    return [data for data in written if data.endswith(b"\r\n") and not data.startswith(b"HTTP")]


async def test_the_last_piece_and_the_end_are_one_write(
    serve: Serve, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await writes_of_a_short_stream(serve, monkeypatch) == [b"3\r\nall\r\n0\r\n\r\n"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("GET /whole", (b"200", b"a whole body")),
        ("HEAD /whole", (b"200", b"")),
        ("GET /part", (b"206", b"whole")),
        ("GET /empty", (b"200", b"")),
        ("GET /nothing", (b"204", b"")),
    ],
)
async def test_a_body_that_is_known_takes_two_messages(
    serve: Serve, connections: Connections, monkeypatch: pytest.MonkeyPatch, asked: str, expected: tuple[bytes, bytes]
) -> None:
    app = QuartTrio("test")
    app.asgi_http_class = AsgiRequest
    app.request_class = BoundedRequest
    sent: list[str] = []
    send = Http1Exchange.send

    @app.get("/whole")
    async def whole() -> TrioResponse:
        return TrioResponse(b"a whole body")

    @app.get("/part")
    async def part() -> TrioResponse:
        response = TrioResponse(b"a whole body", status=206)
        await cast("DataBody", response.response).make_conditional(2, 7)
        response.content_length = 5
        return response

    @app.get("/empty")
    async def empty() -> str:
        return ""

    @app.get("/nothing")
    async def nothing() -> tuple[str, int]:
        return "", 204

    async def note(exchange: Http1Exchange, message: Any) -> None:
        if message is not None:
            sent.append(message["type"])
        await send(exchange, message)

    monkeypatch.setattr(Http1Exchange, "send", note)
    async with serve(app) as server:
        head, body = await ask(server, CLOSING.replace(b"GET /", asked.encode()))
    assert (head.split()[1], body) == expected
    assert sent == ["http.response.start", "http.response.body"]


async def test_access_is_logged(
    serve: Serve, app: QuartTrio, connections: Connections, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serve(app, accesslog=logging.getLogger("access"), access_log_format="%(r)s %(s)s") as server:
        await ask(server, CLOSING)
    assert [record.getMessage() for record in caplog.records if record.name == "access"] == ["GET / 1.1 200"]


@pytest.mark.parametrize("ends", [True, False], ids=["whole", "in the middle"])
async def test_the_access_to_a_response_that_is_given_up_is_logged_once(
    serve: Serve, connections: Connections, caplog: pytest.LogCaptureFixture, ends: bool
) -> None:
    """The send of a piece is cancelled, and the piece may be the last one."""

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("not supported")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with trio.move_on_after(0.05):
            await send({"type": "http.response.body", "body": b"." * (1 << 26), "more_body": not ends})

    caplog.set_level(logging.INFO)
    log = {"accesslog": logging.getLogger("access"), "access_log_format": "%(r)s %(s)s"}
    with trio.fail_after(10):
        async with serve(app, **log) as server, await server.connect() as client:
            await client.send_all(GET)
            async for _ in client:
                pass
            await connections.wait_none_open()
    assert [record.getMessage() for record in caplog.records if record.name == "access"] == ["GET / 1.1 -"]


async def streaming(scope: dict[str, Any], send: Any, sent: list[bytes], *, ended: trio.Event) -> None:
    """Write pieces at once until one does not fit; then send the others, and the end, as ASGI does."""
    exchange = send.__self__
    assert isinstance(exchange, Http1Exchange)
    assert exchange.chunks is None
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["method"] == "HEAD" or scope["http_version"] == "1.0":
        assert exchange.chunks is None
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return
    chunks = exchange.chunks
    assert chunks is not None
    assert chunks.writes_now
    assert not chunks.write_now(b""), "an empty chunk would end the body"
    for number in range(1000):
        piece = b"%06d" % number * 1000
        if not chunks.write_now(piece):
            break
        sent.append(piece)
        if chunks.has_rest:
            assert not chunks.write_now(b"not before the rest")
            break
    assert chunks.written_now == sum(map(len, sent)) > 0
    for piece in (b"then", b"and then"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        sent.append(piece)
    await send({"type": "http.response.body", "body": b""})
    assert not chunks.write_now(b"after the end")
    ended.set()


@pytest.mark.parametrize("size", [1000, 4_000_000])
async def test_pieces_that_are_written_at_once_keep_their_order_with_the_others(
    serve: Serve, connections: Connections, size: int
) -> None:
    sent: list[bytes] = []
    ended = trio.Event()

    async def app(scope: dict[str, Any], _receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("not supported")
        await streaming(scope, send, sent, ended=ended)

    async with serve(app) as server, await server.connect() as client:
        with trio.fail_after(20):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
            await client.send_all(CLOSING)
            await trio.testing.wait_all_tasks_blocked(0.05)
            received = b"".join([part async for part in client])
            await ended.wait()
    body = received.partition(b"\r\n\r\n")[2]
    assert body == b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in sent) + b"0\r\n\r\n"


@pytest.mark.parametrize("request_", [CLOSING.replace(b"GET", b"HEAD"), CLOSING.replace(b"1.1", b"1.0")])
async def test_only_streams_of_chunks_are_written_to_at_once(
    serve: Serve, connections: Connections, request_: bytes
) -> None:
    async def app(scope: dict[str, Any], _receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("not supported")
        await streaming(scope, send, [], ended=trio.Event())

    async with serve(app) as server, await server.connect() as client:
        with trio.fail_after(20):
            await client.send_all(request_)
            assert b"".join([part async for part in client]).startswith(b"HTTP/1.1 200")
