"""Leaving a stream, in any phase and for any cause, closes the upstream connection before control returns."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trustme

from service.models.client import ModelClient, ModelRequest
from service.models.openai_compatible import open_openai_compatible
from tests.models.replies import ask, asking, take
from tests.models.upstream import WAIT_S, open_pair, open_upstream
from tests.upstreams.raw_server import (
    DONE,
    Behaviour,
    Connection,
    RawServer,
    delta,
    established_to,
    finish,
    open_raw_server,
    replying,
    unanswering_port,
)

HUGE = 16 * 1024 * 1024
"""More bytes than the kernel takes for a peer that does not read."""


class Hang:
    """A server that stops at one phase of a reply and then does nothing."""

    def __init__(self, *steps: Callable[[Connection], Awaitable[object]]) -> None:
        self._steps = steps
        self.reached = trio.Event()

    async def __call__(self, connection: Connection) -> None:
        for step in self._steps:
            await step(connection)
        self.reached.set()
        await trio.sleep_forever()


async def request(connection: Connection) -> None:
    await connection.receive_request()


async def head(connection: Connection) -> None:
    await connection.send_head()


async def token(connection: Connection) -> None:
    await connection.send_event(delta("x"))


async def half_a_token(connection: Connection) -> None:
    await connection.send_body(b'data: {"choices": [{"del')


async def comment(connection: Connection) -> None:
    await connection.send_body(b": keep-alive\n\n")


async def finish_reason(connection: Connection) -> None:
    await connection.send_event(finish())


async def error_head(connection: Connection) -> None:
    await connection.send_head(500)


@pytest.mark.parametrize(
    "steps",
    [
        (),
        (request,),
        (request, head),
        (request, head, comment, half_a_token),
        (request, head, token),
        (request, head, token, half_a_token),
        (request, head, token, finish_reason),
        (request, error_head),
    ],
    ids=lambda steps: "-".join(step.__name__ for step in steps) or "connect",
)
async def test_cancelling_closes_the_connection_before_control_returns(steps: tuple[Any, ...]) -> None:
    with trio.fail_after(WAIT_S):
        hang = Hang(*steps)
        async with open_pair(hang) as (server, client):
            await cancel_once(hang.reached, client, server)
            assert server.connections_made == 1


async def cancel_once(
    reached: trio.Event, client: ModelClient, server: RawServer, request: ModelRequest | None = None
) -> None:
    """Ask, cancel once the server has reached its phase and the client waits, and check the connection at once."""
    established_when_left: list[int] = []

    async def ask_until_cancelled() -> None:
        try:
            async with client.stream(request or asking()) as stream:
                await take(stream)
        finally:
            established_when_left.append(server.established)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_until_cancelled)
        await reached.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert server.established == 1
        nursery.cancel_scope.cancel()
    assert established_when_left == [0]


async def test_cancelling_closes_while_the_request_is_still_being_sent() -> None:
    """The peer reads nothing: its window is full, and most of the prompt is still on this side."""
    with trio.fail_after(WAIT_S):
        hang = Hang()
        async with open_pair(hang) as (server, client):
            await cancel_once(hang.reached, client, server, asking("x" * HUGE))


async def test_cancelling_closes_while_the_server_floods() -> None:
    """The client has stopped reading and the server's send is stuck in a full window."""
    with trio.fail_after(WAIT_S):
        first_sent = trio.Event()
        cut = trio.Event()

        async def flood(connection: Connection) -> None:
            await connection.receive_request()
            await connection.send_head()
            await connection.send_event(delta("x"))
            first_sent.set()
            try:
                while True:
                    await connection.send_body(b": " + b"x" * 65536 + b"\n")
            finally:
                cut.set()

        async with open_pair(flood) as (server, client):
            async with client.stream(asking()) as stream:
                await stream.receive()
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert server.established == 0
            await cut.wait()
            await server.wait_idle()


async def test_cancelling_closes_while_connecting() -> None:
    with trio.fail_after(WAIT_S), unanswering_port() as port:
        async with open_openai_compatible(f"http://127.0.0.1:{port}") as client:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, client)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    scope.cancel()


async def test_cancelling_closes_under_comments_for_ever() -> None:
    with trio.fail_after(WAIT_S):
        many_sent = trio.Event()

        async def comment_for_ever(connection: Connection) -> None:
            await connection.receive_request()
            await connection.send_head()
            await connection.send_event(delta(""))
            sent = 0
            while True:
                await connection.send_body(b": keep-alive\n\n")
                sent += 1
                if sent == 1000:
                    many_sent.set()
                await trio.lowlevel.checkpoint()

        async with open_upstream(comment_for_ever) as upstream:
            batches = []

            async def receive() -> None:
                async with upstream.client.stream(asking()) as stream:
                    batches.append(await stream.receive())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await many_sent.wait()
                nursery.cancel_scope.cancel()
            assert upstream.server.established == 0
        assert batches == []


async def test_leaving_between_two_tokens_closes_at_once() -> None:
    hang = Hang(request, head, token)
    with trio.fail_after(WAIT_S):
        async with open_pair(hang) as (server, client):
            async with client.stream(asking()) as stream:
                await stream.receive()
                assert server.established == 1
            assert server.established == 0


async def test_leaving_with_tokens_unread_closes_at_once() -> None:
    async def send_many(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send_head()
        for _ in range(100):
            await connection.send_event(delta("x"))
        await connection.wait_closed()

    async with open_upstream(send_many) as upstream:
        async with upstream.client.stream(asking()) as stream:
            await stream.receive()
        assert upstream.server.established == 0


async def test_the_callers_error_closes_at_once() -> None:
    hang = Hang(request, head, token)

    async def fail(server: RawServer, client: ModelClient) -> None:
        try:
            async with client.stream(asking()) as stream:
                await stream.receive()
                raise ZeroDivisionError
        finally:
            assert server.established == 0

    with trio.fail_after(WAIT_S):
        async with open_pair(hang) as (server, client):
            with pytest.raises(ZeroDivisionError):
                await fail(server, client)


async def test_leaving_in_a_cancelled_scope_closes_at_once() -> None:
    hang = Hang(request, head, token)
    with trio.fail_after(WAIT_S):
        async with open_pair(hang) as (server, client):
            with trio.CancelScope() as scope:
                async with client.stream(asking()) as stream:
                    await stream.receive()
                    scope.cancel()
                assert server.established == 0


# TLS: its close has a handshake of its own, which the client must not wait for


@asynccontextmanager
async def open_tls(behave: Behaviour) -> AsyncIterator[tuple[RawServer, ModelClient]]:
    authority = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    with trio.fail_after(WAIT_S):
        async with (
            open_raw_server(behave, ssl_context=server_context) as server,
            open_openai_compatible(server.url, ssl_context=client_context) as client,
        ):
            yield server, client


async def test_a_tls_peer_that_ignores_the_close_is_not_waited_for() -> None:
    hang = Hang(request, head, token)
    async with open_tls(hang) as (server, client):
        await cancel_once(hang.reached, client, server)


async def test_a_tls_peer_with_a_full_window_is_not_waited_for() -> None:
    reached = trio.Event()

    async def handshake_only(connection: Connection) -> None:
        assert isinstance(connection.stream, trio.SSLStream)
        await connection.stream.do_handshake()
        reached.set()
        await trio.sleep_forever()

    async with open_tls(handshake_only) as (server, client):
        await cancel_once(reached, client, server, asking("x" * HUGE))


async def test_cancelling_closes_in_the_tls_handshake() -> None:
    hang = Hang()
    with trio.fail_after(WAIT_S):
        async with open_raw_server(hang) as server:
            url = server.url.replace("http:", "https:")
            async with open_openai_compatible(url) as client:
                await cancel_once(hang.reached, client, server)


# The client as a whole


async def test_closing_the_client_closes_its_kept_connections() -> None:
    with trio.fail_after(WAIT_S):
        async with open_raw_server(replying(finish(), DONE)) as server:
            async with open_openai_compatible(server.url) as client:
                await ask(client)
                assert server.established == 1
            assert server.established == 0
            await server.wait_idle()


async def test_closing_the_client_in_a_cancelled_scope_closes_its_kept_connections() -> None:
    with trio.fail_after(WAIT_S):
        async with open_raw_server(replying(finish(), DONE)) as server:
            with trio.CancelScope() as scope:
                async with open_openai_compatible(server.url) as client:
                    await ask(client)
                    scope.cancel()
                assert server.established == 0
            await server.wait_idle()


async def test_two_hundred_streams_are_cancelled_together_and_none_is_left() -> None:
    count = 200
    arrived = 0
    all_there = trio.Event()

    async def hang(connection: Connection) -> None:
        nonlocal arrived
        await connection.receive_request()
        await connection.send_head()
        await connection.send_event(delta("x"))
        arrived += 1
        if arrived == count:
            all_there.set()
        await connection.wait_closed()

    async with open_upstream(hang) as upstream:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(ask, upstream.client)
            await all_there.wait()
            nursery.cancel_scope.cancel()
        assert upstream.server.established == 0
        assert established_to(upstream.server.port) == 0
