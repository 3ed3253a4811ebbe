"""The API over real connections: the answers on the wire, also to a faulty client."""

import json
from collections.abc import Callable

import pytest
import trio

from service.settings import Settings
from tests.service.serving import Serving, read_to_end, serving

CAP_S = 60
SLOW = "scripted:?tokens=1000&rate=50&first_token_s=0"
FAST = "scripted:?tokens=200&rate=0&first_token_s=0"


def request(method: str, path: str, body: bytes = b"", *, length: int | None = None, extra: str = "") -> bytes:
    kind = "content-type: application/json\r\n"
    size = f"content-length: {len(body) if length is None else length}\r\n"
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{kind}{size}{extra}\r\n".encode() + body


async def exchange(server: Serving, *pieces: bytes) -> bytes:
    """Send, and read until the server closes."""
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        for piece in pieces:
            await stream.send_all(piece)
        return await read_to_end(stream)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a change in the server that its client cannot see."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.005)


async def test_a_stream_ends_with_its_last_chunk_on_a_connection_that_stays() -> None:
    with trio.fail_after(CAP_S):
        async with serving(Settings(store_url="memory:", model_url=FAST)) as server:
            chat = request("POST", "/chat", b'{"message": "Hi"}')
            last = request("GET", "/healthz", extra="connection: close\r\n")
            received = await exchange(server, chat, last)
    assert received.startswith(b"HTTP/1.1 200")
    assert b'"turn.completed"' in received
    stream, _, rest = received.partition(b"\r\n0\r\n\r\n")
    assert stream.count(b"turn.delta") == 200
    assert rest.endswith(b'{"status":"ok"}')


async def test_many_streams_of_one_turn_are_the_same_whenever_they_join() -> None:
    received: list[list[bytes]] = []

    async def follow(server: Serving, path: str, delay: float) -> None:
        await trio.sleep(delay)
        async with await server.connect("GET", path, accept="text/event-stream") as stream:
            body = await read_to_end(stream)
        received.append([line for line in body.splitlines() if line.startswith((b"data:", b"id:"))])

    with trio.fail_after(CAP_S):
        model_url = "scripted:?tokens=50&rate=200&first_token_s=0"
        async with serving(Settings(store_url="memory:", model_url=model_url)) as server:
            _, session = await server.call("POST", "/sessions", {})
            path = f"/sessions/{session['id']}/turns"
            _, turn = await server.call("POST", path, {"input": "Hi", "background": True})
            async with trio.open_nursery() as nursery:
                for n in range(10):
                    nursery.start_soon(follow, server, f"{path}/{turn['id']}/events", n * 0.05)
            assert server.service.sessions.statistics().streams_ended == 10
    assert len(received) == 10
    assert len(received[0]) == 2 * 52
    assert all(stream == received[0] for stream in received)


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_a_client_that_closes_its_socket_ends_its_turn(accept: str) -> None:
    with trio.fail_after(CAP_S):
        async with serving(Settings(store_url="memory:", model_url=SLOW)) as server:
            _, session = await server.call("POST", "/sessions", {})
            path = f"/sessions/{session['id']}/turns"
            stream = await server.connect("POST", path, {"input": "Hi"}, accept=accept)
            await until(lambda: server.service.sessions.statistics().turns_running > 0)
            await stream.aclose()
            await until(lambda: server.service.sessions.statistics().turns_cancelled > 0)
            assert server.service.sessions.statistics().streams_open == 0
            _, turns = await server.call("GET", path)
            assert isinstance(turns["data"], list)
            assert turns["data"][0]["reason"] == "disconnected"


async def test_a_body_that_is_said_to_be_too_large_is_answered_before_it_is_sent() -> None:
    with trio.fail_after(CAP_S):
        async with serving(Settings(store_url="memory:", input_bytes_max=1024)) as server:
            received = await exchange(server, request("POST", "/chat", length=1 << 30))
    assert received.startswith(b"HTTP/1.1 413")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["code"] == "input_too_large"


async def test_a_body_without_a_length_is_answered_at_the_bound() -> None:
    head = (
        b"POST /chat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    with trio.fail_after(CAP_S):
        async with serving(Settings(store_url="memory:", input_bytes_max=1024)) as server:
            stream = await trio.open_tcp_stream("127.0.0.1", server.port)
            async with stream:
                await stream.send_all(head)
                for _ in range(9):  # one chunk more than the bound has room for
                    await stream.send_all(chunk)
                received = await stream.receive_some()
    assert received.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("path", "refusal"), [(b"/chat", b"HTTP/1.1 4"), (b"/v1/responses", b"HTTP/1.1 404"), (b"/v1/x", b"HTTP/1.1 404")]
)
async def test_a_websocket_is_refused_and_nothing_breaks(path: bytes, refusal: bytes) -> None:
    upgrade = (
        b"GET " + path + b" HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with trio.fail_after(CAP_S):
        async with serving(Settings(store_url="memory:")) as server:
            async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                await stream.send_all(upgrade)
                received = await stream.receive_some()
            assert not received.startswith(b"HTTP/1.1 101")
            assert received.startswith(refusal)
            assert (await server.call("GET", "/healthz"))[0] == 200


@pytest.mark.parametrize("host", ["evil.example.com", "a b", "localhost:port", "[::1", "\xff", ""])
async def test_a_host_header_that_is_not_this_machine_is_refused(host: str) -> None:
    with trio.fail_after(CAP_S):
        async with serving(Settings(store_url="memory:")) as server:
            head = f"GET /sessions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
            received = await exchange(server, head.encode("latin1"))
    assert received.startswith((b"HTTP/1.1 403", b"HTTP/1.1 400"))
