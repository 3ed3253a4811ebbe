"""A client that closes its sending side after its request gets its answer, or is gone if the handler decides so."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from quart_trio import QuartTrio

from service.api.http.end_of_input import leave_at_end_of_input
from service.api.http.request_body import BoundedRequest
from service.hosting.hypercorn.asgi_request import AsgiRequest
from service.hosting.hypercorn.connections import Connections
from tests.hosting.conftest import Serve

CAP_S = 10


class App(QuartTrio):
    """Answers wait for :attr:`go_on`. With ``/before`` or ``/after`` that, the end of input counts as leaving."""

    def __init__(self) -> None:
        super().__init__("test")
        self.asgi_http_class = AsgiRequest
        self.request_class = BoundedRequest
        self.config["MAX_CONTENT_LENGTH"] = 1000
        self.begun = trio.Event()
        self.go_on = trio.Event()
        self.left = trio.Event()
        self.route("/<when>", methods=["GET", "POST"])(self.answer)

    async def answer(self, when: str) -> str:
        self.begun.set()
        try:
            if when == "before":
                leave_at_end_of_input()
            await self.go_on.wait()
            if when == "after":
                leave_at_end_of_input()
                await trio.sleep_forever()
        except trio.Cancelled:
            self.left.set()
            raise
        return "answered"


def request(path: str, body: bytes = b"", *, length: int | None = None) -> bytes:
    head = f"POST /{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body) if length is None else length}"
    return head.encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def half_closed(serve: Serve, app: App, data: bytes) -> AsyncIterator[trio.SocketStream]:
    async with serve(app) as server, await server.connect() as client:
        with trio.fail_after(CAP_S):
            await client.send_all(data)
            await client.send_eof()
            yield client


async def rest_of(client: trio.SocketStream) -> bytes:
    return b"".join([part async for part in client])


@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_a_request_whose_input_has_ended_is_answered_and_its_connection_closes(
    body: bytes, serve: Serve, connections: Connections
) -> None:
    app = App()
    async with half_closed(serve, app, request("never", body)) as client:
        await app.begun.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)  # the server has seen the end
        assert not app.left.is_set()
        app.go_on.set()
        answer = await rest_of(client)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"answered")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not connections._open


async def test_each_of_several_requests_is_answered(serve: Serve, connections: Connections) -> None:
    app = App()
    app.go_on.set()
    async with half_closed(serve, app, 3 * request("never", b"{}")) as client:
        assert (await rest_of(client)).count(b"answered") == 3


async def test_a_request_that_takes_the_end_for_leaving_is_cancelled(serve: Serve, connections: Connections) -> None:
    app = App()
    async with half_closed(serve, app, request("before")) as client:
        await app.left.wait()
        assert await rest_of(client) == b""
    assert not connections._open


async def test_a_request_that_does_so_after_the_end_is_cancelled_then(serve: Serve, connections: Connections) -> None:
    app = App()
    async with half_closed(serve, app, request("after")) as client:
        await app.begun.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not app.left.is_set()
        app.go_on.set()
        await app.left.wait()
        assert await rest_of(client) == b""


async def test_a_request_whose_body_is_not_whole_is_refused(serve: Serve, connections: Connections) -> None:
    app = App()
    async with half_closed(serve, app, request("never", b"{", length=2)) as client:
        assert (await rest_of(client)).startswith(b"HTTP/1.1 400")
        await app.left.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not connections._open


async def test_a_client_that_is_reset_has_left(serve: Serve, connections: Connections) -> None:
    app = App()
    async with serve(app) as server:
        with trio.fail_after(CAP_S):
            client = await server.connect()
            await client.send_all(request("never"))
            await app.begun.wait()
            client.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await client.aclose()
            await app.left.wait()


async def test_a_stop_does_not_wait_for_such_a_request_beyond_its_own_time(
    serve: Serve, connections: Connections
) -> None:
    app = App()
    async with serve(app, graceful_timeout=0.1) as server, await server.connect() as client:
        with trio.fail_after(CAP_S):
            await client.send_all(request("never"))
            await client.send_eof()
            await app.begun.wait()
            server.stop.set()
            await server.gone.wait()
            assert app.left.is_set()
