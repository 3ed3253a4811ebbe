"""Streams on HTTP/1 that bypass hypercorn and h11: a client sees the same bytes."""

import logging
import os
from collections.abc import AsyncIterator

import pytest
import trio
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse

from service.api.http.event_stream import LastPiece
from service.api.http.request_body import BoundedRequest
from service.hosting.hypercorn import chunked_response
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.hypercorn.connections import Connections
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


@pytest.mark.removal
async def test_it_is_still_needed(serve: Serve, connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test fails once hypercorn sends the last piece with the end; then ChunkedResponse.end is not needed."""
    monkeypatch.setattr(chunked_response.ChunkedResponse, "begun_by", lambda _send: None)
    assert await writes_of_a_short_stream(serve, monkeypatch) == [b"3\r\nall\r\n", b"0\r\n\r\n"]


async def test_access_is_logged(
    serve: Serve, app: QuartTrio, connections: Connections, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serve(app, accesslog=logging.getLogger("access"), access_log_format="%(r)s %(s)s") as server:
        await ask(server, CLOSING)
    assert [record.getMessage() for record in caplog.records if record.name == "access"] == ["GET / 1.1 200"]
