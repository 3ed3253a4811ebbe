"""Quart-Trio's requests, with and without the workarounds."""

import re
from pathlib import Path

import pytest
import trio
import trio.testing
from quart import request
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection

from service.api.app import attach, create_app
from service.api.http.app_state import held_bytes_of
from service.hosting.hypercorn.asgi_request import AsgiRequest, open_requests
from service.settings import Settings
from service.shutdown import Shutdown
from service.supervisor import open_service
from tests.hosting.conftest import BRIEF_S, PATIENT_S, Serve, Served

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def an_app(http_class: type[TrioASGIHTTPConnection]) -> QuartTrio:
    app = QuartTrio("test")
    app.asgi_http_class = http_class

    @app.get("/")
    async def index() -> str:
        return "here"

    @app.post("/")
    async def upload() -> str:
        await request.get_data()
        return "got it"

    return app


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([part async for part in stream])


async def is_closed_after_keep_alive(
    serve: Serve, http_class: type[TrioASGIHTTPConnection], *, patience_s: float
) -> bool:
    async with serve(an_app(http_class), keep_alive_timeout=0.1) as server:
        with trio.fail_after(10):
            async with await server.connect() as stream:
                await stream.send_all(GET)
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
                with trio.move_on_after(patience_s):
                    await receive_all(stream)
                    return True
    return False


async def test_a_kept_alive_connection_obeys_its_timeout(serve: Serve) -> None:
    assert await is_closed_after_keep_alive(serve, AsgiRequest, patience_s=PATIENT_S)


@pytest.mark.removal
async def test_the_shield_of_the_last_send_is_still_needed(serve: Serve) -> None:
    """This test fails once hypercorn and Quart-Trio close it by themselves; then AsgiRequest._send is not needed."""
    assert not await is_closed_after_keep_alive(serve, TrioASGIHTTPConnection, patience_s=BRIEF_S)


async def test_responses_close_their_connection_once_no_work_is_accepted(serve: Serve) -> None:
    app = an_app(AsgiRequest)
    shutdown = Shutdown(Settings())
    open_requests(app, shutdown)
    async with serve(app) as server:
        with trio.fail_after(10):
            async with await server.connect() as stream:
                await stream.send_all(GET)
                assert b"connection: close" not in (await stream.receive_some()).lower()
                shutdown.notice("test")
                await stream.send_all(GET)
                assert b"connection: close" in (await receive_all(stream)).lower()


async def test_a_request_whose_body_is_still_coming_is_answered_when_the_work_has_ended(serve: Serve) -> None:
    app = create_app()
    app.asgi_http_class = AsgiRequest
    async with open_service(Settings(store_url="memory:")) as service, serve(app) as server:
        attach(app, service)
        requests = open_requests(app, service.shutdown)
        with trio.fail_after(10):
            async with await server.connect() as stream:
                await stream.send_all(
                    b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 1000\r\n\r\n{"
                )
                await trio.testing.wait_all_tasks_blocked(0.05)
                service.shutdown.notice("test")
                requests.refuse_uploads(older_than_s=30)  # it began a moment ago
                with trio.move_on_after(0.05) as waiting:
                    await stream.receive_some()
                assert waiting.cancelled_caught
                requests.refuse_uploads()
                answer = await receive_all(stream)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"shutting_down" in answer


async def call(server: Served, method: bytes, path: bytes, body: bytes = b"") -> bytes:
    async with await server.connect() as stream:
        await stream.send_all(
            b"%b %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (method, path, len(body), body)
        )
        return await receive_all(stream)


@pytest.mark.parametrize("store", ["memory:", "sqlite"])
async def test_a_body_is_dropped_when_its_answer_begins_and_the_rest_of_it_is_not_kept(
    serve: Serve, tmp_path: Path, store: str
) -> None:
    size = 200_000
    app = create_app()
    app.asgi_http_class = AsgiRequest
    settings = Settings(
        store_url=f"sqlite:{tmp_path}/a.db" if store == "sqlite" else store, model_url="scripted:?tokens=1000&rate=20"
    )
    with trio.fail_after(20):
        async with open_service(settings) as service, serve(app) as server:
            attach(app, service)
            await call(server, b"POST", b"/sessions", b'{"id": "s"}')
            answer = await call(server, b"POST", b"/sessions/s/turns", b'{"input": "hi", "background": true}')
            turn = re.search(rb"/sessions/s/turns/turn_[0-9a-f]{32}", answer)
            assert turn is not None
            async with await server.connect() as stream:
                head = b"GET %b/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (turn[0], size)
                await stream.send_all(head + b"x" * (size // 2))
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
                await stream.send_all(b"x" * (size // 2))
                await stream.receive_some()
                assert held_bytes_of(app).bytes == 0
                assert b"200" in await call(server, b"POST", turn[0] + b"/cancel")
                await receive_all(stream)
            assert held_bytes_of(app).bytes == 0


@pytest.mark.parametrize("closing", [False, True])
async def test_http2_responses_have_no_connection_header(closing: bool) -> None:
    app = an_app(AsgiRequest)
    shutdown = Shutdown(Settings())
    open_requests(app, shutdown)
    if closing:
        shutdown.notice("test")
    sent = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    connection = AsgiRequest(app, {"http_version": "2"})  # type: ignore[typeddict-item]
    await connection._send(send, {"type": "http.response.start", "status": 200, "headers": []})
    assert sent == [{"type": "http.response.start", "status": 200, "headers": []}]
