"""The transport on real sockets, plain and with TLS: odd servers, kept connections, and cancelling at each step."""

import errno
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
import trustme

from service.models.http import head as head_module
from service.models.http.connect import TlsError, connect
from service.models.http.connection import Connection as SendingConnection
from service.models.http.read_poller import open_read_poller
from service.models.http.transport import BODY, ResponseBody, Transport
from tests.models.replies import Reading
from tests.models.replies import ask as ask_client
from tests.models.upstream import WAIT_S, Wire, failure_of, open_pair, tls_contexts
from tests.upstreams.raw_server import DONE, Behaviour, Connection, RawServer, delta, finish, open_raw_server, replying

HUGE = b"x" * (16 * 1024 * 1024)
"""More bytes than the kernel takes for a peer that does not read."""
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = CHUNKED + b"2\r\nhi\r\n0\r\n\r\n"


@asynccontextmanager
async def open_transport(behave: Behaviour) -> AsyncIterator[tuple[Transport, RawServer]]:
    """On exit it checks that no connection is left."""
    for_server, for_client = tls_contexts() if Wire.has_tls else (None, None)
    with trio.fail_after(WAIT_S):
        async with open_raw_server(behave, ssl_context=for_server) as server:
            async with (
                open_read_poller() as poller,
                Transport(
                    httpx.URL(server.url),
                    ssl_context=for_client,
                    connect_timeout_s=WAIT_S,
                    idle_max=4,
                    idle_expiry_s=60,
                    poller=poller,
                ) as transport,
            ):
                yield transport, server
            assert server.established == 0
            await server.wait_idle()


async def send(transport: Transport, server: RawServer, body: bytes = b"{}") -> tuple[int, ResponseBody]:
    """The response's status and body."""
    response = await transport.handle_async_request(httpx.Request("POST", server.url + "/v1", content=body))
    return response.status_code, response.extensions[BODY]


async def read(body: ResponseBody) -> bytes:
    pieces = []

    def take(piece: bytes) -> bool:
        pieces.append(piece)
        return True

    while True:
        if Reading.relays:
            await body.relay(take)
        if not (piece := await body.receive()):
            return b"".join(pieces)
        pieces.append(piece)


async def ask(transport: Transport, server: RawServer, body: bytes = b"{}") -> bytes:
    return await read((await send(transport, server, body))[1])


def plain_stream(connection: Connection) -> trio.SocketStream:
    """The stream under a server's connection, without TLS."""
    stream = connection.stream
    plain = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    assert isinstance(plain, trio.SocketStream)
    return plain


def answering(*answers: bytes) -> Behaviour:
    """Answer one request after the other with these bytes, on each connection from the beginning."""

    async def answer(connection: Connection) -> None:
        for data in answers:
            await connection.receive_request()
            await connection.send(data)
        await connection.wait_closed()

    return answer


# What is read


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
        + WHOLE,
        OK + b"Content-Length: 2\r\n\r\nhi",
        OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
        OK + b"Transfer-Encoding: Chunked\r\n\r\n1;a=b\r\nh\r\n01\r\ni\r\n0\r\nx-trailer: y\r\n\r\n",
    ],
)
async def test_a_whole_response_leaves_its_connection_to_the_next_request(answer: bytes) -> None:
    async with open_transport(answering(*[answer] * 3)) as (transport, server):
        for _ in range(3):
            assert await ask(transport, server) == b"hi"
        assert server.connections_made == 1


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        OK + b"transfer-encoding: chunked\nx: y\nTransfer-Encoding: CHUNKED\n\n2\nhi\n0\n\n",
        CHUNKED + b"2\nhi\n0\n\n",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        OK + b"Connection: x, Close\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
        WHOLE + WHOLE,
        OK + b"Content-Length: 2\r\n\r\nhi" + WHOLE,
    ],
)
async def test_a_connection_whose_next_response_might_begin_elsewhere_is_not_used_again(answer: bytes) -> None:
    async with open_transport(answering(answer, b"HTTP/1.1 500 Wrong\r\n\r\n")) as (transport, server):
        for _ in range(3):
            assert await ask(transport, server) == b"hi"
            assert server.established == 0
        assert server.connections_made == 3


async def test_a_response_without_a_length_ends_with_its_connection() -> None:
    async def answer(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send(OK + b"\r\nhi")

    async with open_transport(answer) as (transport, server):
        assert await ask(transport, server) == b"hi"
        assert server.established == 0


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@pytest.mark.parametrize(
    ("announced", "connections"),
    [(b"", 1), (b"Content-Length: 0\r\n", 1), (b"Content-Length: 5\r\n", 2), (b"Transfer-Encoding: chunked\r\n", 2)],
)
async def test_a_response_without_a_body_is_over_with_its_head_and_the_connection_too_if_a_body_may_follow(
    status: bytes, announced: bytes, connections: int
) -> None:
    answer = b"HTTP/1.1 " + status + b"\r\n" + announced + b"\r\n"
    async with open_transport(answering(answer, answer)) as (transport, server):
        for _ in range(2):
            assert await ask(transport, server) == b""
        assert server.connections_made == connections


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        (CHUNKED, b"2\r\nhi\r\n0\r\n\r\n"),
        (CHUNKED + b"2\r\nh", b"i\r\n0\r\n\r\n"),
        (OK + b"Content-Length: 2\r\n\r\n", b"hi"),
        (OK + b"Content-Length: 2\r\n\r\nh", b"i"),
    ],
)
async def test_the_last_bytes_may_come_together_with_the_end(head: bytes, rest: bytes) -> None:
    async def answer(connection: Connection) -> None:
        for _ in range(2):
            await connection.receive_request()
            await connection.send(head)
            await trio.testing.wait_all_tasks_blocked(0.001)
            await connection.send(rest)
        await connection.wait_closed()

    async with open_transport(answer) as (transport, server):
        for _ in range(2):
            assert await ask(transport, server) == b"hi"
        assert server.connections_made == 1


async def test_relayed_bytes_before_a_broken_chunk_are_given_first_and_the_error_is_the_next_call_s() -> None:
    async def answer(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send(CHUNKED)
        await trio.testing.wait_all_tasks_blocked(0.001)
        await connection.send(b"2\r\nhi\r\nno size\r\n")
        await connection.wait_closed()

    async with open_transport(answer) as (transport, server):
        _, body = await send(transport, server)
        await body.relay(lambda piece: pytest.fail(f"{piece!r} is left to receive"))
        assert await body.receive() == b"hi"
        await body.relay(lambda piece: pytest.fail(f"{piece!r} comes after the error"))
        with pytest.raises(httpx.RemoteProtocolError):
            await body.receive()
        assert server.established == 0


async def test_relaying_ends_when_the_taker_wants_no_more_and_nothing_is_lost() -> None:
    async def answer(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send(CHUNKED)
        for piece in (b"a", b"b", b"c"):
            await trio.testing.wait_all_tasks_blocked(0.001)
            await connection.send_body(piece)
        await connection.end_body()
        await connection.wait_closed()

    taken: list[bytes] = []

    def take(piece: bytes) -> bool:
        taken.append(piece)
        return piece != b"b"

    async with open_transport(answer) as (transport, server):
        _, body = await send(transport, server)
        await body.relay(take)
        assert taken == [b"a", b"b"]
        assert await read(body) == b"c"


async def test_bytes_after_a_response_without_a_body_end_its_connection() -> None:
    async with open_transport(answering(b"HTTP/1.1 204 No Content\r\n\r\nhi")) as (transport, server):
        for _ in range(2):
            assert await ask(transport, server) == b""
        assert server.connections_made == 2


# What is refused, and its bounds


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi",
        OK + b"Content-Length: -2\r\n\r\nhi",
        OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nhi",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        OK + b"a: \x00\r\n\r\n",
    ],
)
async def test_an_answer_that_is_not_http_or_ambiguous_is_refused_at_once(answer: bytes) -> None:
    """The server keeps the connection open: nothing is waited for."""
    async with open_transport(answering(answer)) as (transport, server):
        with pytest.raises(httpx.RemoteProtocolError):
            await send(transport, server)
        assert server.established == 0


def endless(start: bytes, piece: bytes) -> Behaviour:
    async def send_for_ever(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send(start)
        while True:
            await connection.send(piece)

    return send_for_ever


@pytest.mark.parametrize(
    "behave",
    [
        endless(OK + b"x: ", b"x" * 4096),
        endless(OK, b"x: y\r\n" * 500),
        endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 50),
    ],
)
async def test_a_head_without_an_end_is_refused(behave: Behaviour) -> None:
    async with open_transport(behave) as (transport, server):
        with pytest.raises(httpx.RemoteProtocolError):
            await send(transport, server)


async def test_interim_responses_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "INTERIM_MAX", 2)
    interim = b"HTTP/1.1 102 Processing\r\n\r\n"
    async with open_transport(answering(interim * 2 + WHOLE, interim * 3 + WHOLE)) as (transport, server):
        assert await ask(transport, server) == b"hi"
        with pytest.raises(httpx.RemoteProtocolError):
            await send(transport, server)


@pytest.mark.parametrize(
    "behave",
    [
        endless(CHUNKED + b"2\r\nhi\r\n", b"0" * 4096),
        endless(CHUNKED + b"2\r\nhi\r\n1;", b"x" * 4096),
        endless(CHUNKED + b"2\r\nhi\r\n0\r\n", b"x: y\r\n" * 500),
        answering(CHUNKED + b"2\r\nhi\r\nno size\r\n"),
        answering(CHUNKED + b"2\r\nhi5\r\n"),
    ],
)
async def test_a_body_without_its_framing_is_an_error_after_the_bytes_before_it(behave: Behaviour) -> None:
    async with open_transport(behave) as (transport, server):
        _, body = await send(transport, server)
        assert await body.receive() == b"hi"
        with pytest.raises(httpx.RemoteProtocolError):
            await body.receive()
        assert server.established == 0


@pytest.mark.parametrize(
    "start", [CHUNKED + b"5\r\nhi", CHUNKED + b"2\r\nhi\r\n0\r\n", OK + b"Content-Length: 5\r\n\r\nhi"]
)
async def test_a_body_that_is_cut_is_an_error_after_the_bytes_before_it(start: bytes) -> None:
    async def cut(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send(start)

    async with open_transport(cut) as (transport, server):
        _, body = await send(transport, server)
        assert await body.receive() == b"hi"
        with pytest.raises(httpx.RemoteProtocolError, match="closed"):
            await body.receive()


async def test_a_reset_within_a_body_is_a_read_error() -> None:
    async def reset(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send(CHUNKED + b"5\r\nhi")
        await taken.wait()
        connection.reset_when_closed()

    taken = trio.Event()
    async with open_transport(reset) as (transport, server):
        _, body = await send(transport, server)
        assert await body.receive() == b"hi"
        taken.set()
        for _ in range(2):
            with pytest.raises(httpx.ReadError, match="reset"):
                await body.receive()


async def test_a_closed_body_is_not_read_on() -> None:
    async with open_transport(answering(CHUNKED)) as (transport, server):
        _, body = await send(transport, server)
        body.close()
        body.close()
        assert server.established == 0
        with pytest.raises(httpx.StreamClosed):
            await body.receive()


# Requests that are not taken to their end


@pytest.mark.parametrize("ends_its_side", [False, True])
async def test_a_refusal_before_the_whole_request_is_read_ends_the_sending(ends_its_side: bool) -> None:
    """The server reads nothing more, and keeps the connection open, or its receiving side of it."""

    async def refuse(connection: Connection) -> None:
        await connection.stream.receive_some(100)
        await connection.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        if ends_its_side:
            await plain_stream(connection).send_eof()
        await done.wait()

    done = trio.Event()
    async with open_transport(refuse) as (transport, server):
        status, body = await send(transport, server, HUGE)
        assert (status, await read(body)) == (413, b"no")
        assert server.established == 0, "half of a request is on the connection"
        done.set()


async def test_a_request_is_sent_to_its_end_though_the_answer_has_begun() -> None:
    got = 0

    async def answer_early(connection: Connection) -> None:
        nonlocal got
        got = len(await connection.stream.receive_some(100))
        await connection.send(b"HTTP/1.1 102 Processing\r\n\r\n" + CHUNKED + b"2\r\nhi\r\n")
        await trio.testing.wait_all_tasks_blocked(0.01)
        while got < len(HUGE):
            got += len(await connection.stream.receive_some(1024 * 1024))
        await connection.send(b"0\r\n\r\n")
        await connection.wait_closed()

    async with open_transport(answer_early) as (transport, server):
        assert await ask(transport, server, HUGE) == b"hi"
        assert got >= len(HUGE)


async def test_an_answer_is_read_though_its_server_reads_no_more_of_the_request() -> None:
    async def answer_without_reading(connection: Connection) -> None:
        await connection.stream.receive_some(100)
        await connection.send(CHUNKED)
        for piece in (b"h", b"i"):
            await trio.testing.wait_all_tasks_blocked(0.001)
            await connection.send_body(piece)
        await connection.end_body()
        await done.wait()

    done = trio.Event()
    async with open_transport(answer_without_reading) as (transport, server):
        assert await ask(transport, server, HUGE) == b"hi"
        assert server.established == 0, "half of a request is on the connection"
        done.set()


async def test_a_system_that_cannot_wait_for_a_socket_is_a_write_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait_writable(_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.ENOMEM, "Cannot allocate")

    async def take_nothing(connection: Connection) -> None:
        await done.wait()

    done = trio.Event()
    async with open_transport(take_nothing) as (transport, server):
        with monkeypatch.context() as patch:
            patch.setattr("service.models.http.connection.trio.lowlevel.wait_writable", wait_writable)
            with pytest.raises(httpx.WriteError, match="Cannot allocate"):
                await send(transport, server, HUGE)
        done.set()


async def test_a_server_that_goes_while_the_request_is_sent_is_a_read_error() -> None:
    async def leave(connection: Connection) -> None:
        await connection.stream.receive_some(100)

    async with open_transport(leave) as (transport, server):
        with pytest.raises(httpx.ReadError):
            await send(transport, server, HUGE)
        assert server.connections_made == 1


async def test_a_server_that_ends_its_side_without_an_answer_is_a_read_error() -> None:
    async def half_close(connection: Connection) -> None:
        await connection.receive_request()
        await plain_stream(connection).send_eof()
        await connection.wait_closed()

    async with open_transport(half_close) as (transport, server):
        with pytest.raises(httpx.ReadError):
            await send(transport, server)


@pytest.mark.parametrize("waits_first", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOBUFS, "No buffer space"), "resources_exhausted"),
        (OSError(errno.ENOMEM, "Cannot allocate"), "resources_exhausted"),
        (OSError(errno.EHOSTUNREACH, "No route"), "upstream_unreachable"),
        (ssl.SSLWantReadError("a second handshake"), "upstream_unreachable"),
    ],
)
async def test_a_request_that_this_side_cannot_send_waits_for_no_answer(
    error: OSError, code: str, waits_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server waits for the request, and so would never answer."""
    tried = 0

    def fail(connection: SendingConnection, data: memoryview) -> int:
        nonlocal tried
        tried += 1
        if waits_first and tried == 1:
            return 0
        raise error

    async with open_pair(replying(delta("x"), finish(), DONE)) as (server, client):
        await ask_client(client)
        assert server.established == 1
        monkeypatch.setattr(SendingConnection, "send_nowait", fail)
        failure = await failure_of(client)
        assert (failure.code, failure.retryable) == (code, True)
        assert tried >= 1 + waits_first
        assert (server.established, server.connections_made) == (0, 1)


# Kept connections


async def test_a_kept_connection_on_which_the_server_speaks_unasked_is_not_used() -> None:
    spoke = trio.Event()

    async def speak(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send(WHOLE)
        if connection.number == 0:
            await asked.wait()
            await connection.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            spoke.set()
        await connection.wait_closed()

    asked = trio.Event()
    async with open_transport(speak) as (transport, server):
        assert await ask(transport, server) == b"hi"
        asked.set()
        await spoke.wait()
        assert await ask(transport, server) == b"hi"
        assert server.connections_made == 2


@pytest.mark.parametrize(("answer", "connections"), [(b"", 2), (b"H", 1), (b"HTTP/1.1 102 Processing\r\n\r\n", 1)])
async def test_a_request_is_sent_again_only_if_a_kept_connection_ended_without_a_byte_of_an_answer(
    answer: bytes, connections: int
) -> None:
    requests = 0

    async def end(connection: Connection) -> None:
        nonlocal requests
        await connection.receive_request()
        requests += 1
        await connection.send(WHOLE)
        await connection.receive_request()
        requests += 1
        if answer:
            await connection.send(answer)

    async with open_transport(end) as (transport, server):
        assert await ask(transport, server) == b"hi"
        if answer:
            with pytest.raises(httpx.ReadError):
                await ask(transport, server)
        else:
            assert await ask(transport, server) == b"hi"
        assert server.connections_made == connections
        assert requests == 1 + connections


async def test_a_request_that_a_kept_connection_leaves_unanswered_for_long_is_not_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server may have worked on it: a retry is the caller's to decide."""
    monkeypatch.setattr("service.models.http.transport.RESEND_S", -1.0)

    async def end(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send(WHOLE)
        await connection.receive_request()

    async with open_transport(end) as (transport, server):
        assert await ask(transport, server) == b"hi"
        with pytest.raises(httpx.ReadError):
            await ask(transport, server)
        assert server.connections_made == 1


async def test_a_connection_of_a_closed_transport_is_closed_after_its_response() -> None:
    async with open_transport(answering(CHUNKED + b"2\r\nhi\r\n0\r\n\r\n")) as (transport, server):
        _, body = await send(transport, server)
        await transport.aclose()
        await read(body)


async def test_a_transport_reaches_one_server_only() -> None:
    async with open_transport(answering()) as (transport, server):
        with pytest.raises(httpx.UnsupportedProtocol):
            await transport.handle_async_request(httpx.Request("POST", "http://other.test/v1"))
        assert server.connections_made == 0


# Cancelling


class CancelAt(trio.abc.Instrument):
    """Cancels a scope when a task is about to run its n-th step."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, step: int) -> None:
        self._task, self._scope, self._steps_left = task, scope, step

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._steps_left -= 1
            if self._steps_left == 0:
                self._scope.cancel()


async def test_cancelling_at_any_step_leaves_no_connection_that_is_half_read() -> None:
    """Cancelled at its first wait, at its second, and so on, until one request reaches its end."""

    async def answer_in_pieces(connection: Connection) -> None:
        while True:
            await connection.receive_request()
            for piece in (
                OK[:9],
                OK[9:] + b"Transfer-Encoding: chunked\r\n\r\n",
                b"2\r",
                b"\nh",
                b"i\r\n0\r\n",
                b"\r\n",
            ):
                await connection.send(piece)
                await trio.testing.wait_all_tasks_blocked()

    step = 0
    async with open_transport(answer_in_pieces) as (transport, server):
        while True:
            step += 1
            with trio.CancelScope() as scope:
                instrument = CancelAt(trio.lowlevel.current_task(), scope, step)
                trio.lowlevel.add_instrument(instrument)
                try:
                    _, body = await send(transport, server)
                    try:
                        assert await read(body) == b"hi"
                    finally:
                        body.close()
                finally:
                    trio.lowlevel.remove_instrument(instrument)
                    kept = len(transport._idle)
                    assert server.established == kept
            if not scope.cancelled_caught:
                break
            transport._idle.close()
        assert step > 5
        assert await ask(transport, server) == b"hi", "the last connection is kept, and whole"


# Connecting


async def test_the_next_address_of_a_name_is_tried_when_one_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name has an IPv6 address that does not answer, one that refuses, and one that serves."""

    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: object, port: object, *_: object, **__: object) -> list[tuple[object, ...]]:  # type: ignore[override]
            assert host in {b"model.test", "model.test"}
            tcp = trio.socket.SOCK_STREAM
            return [
                (trio.socket.AF_INET6, tcp, 6, "", ("100::1", port, 0, 0)),
                (trio.socket.AF_INET, tcp, 6, "", ("127.0.0.2", port)),
                (trio.socket.AF_INET, tcp, 6, "", ("127.0.0.1", port)),
            ]

        async def getnameinfo(self, *_: object) -> tuple[str, str]:
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(Resolver())
    try:
        with trio.fail_after(WAIT_S):
            async with open_raw_server(answering(WHOLE)) as server:
                connection = await connect("model.test", server.port, ssl_context=None, connect_timeout_s=WAIT_S)
                assert server.established == 1
                connection.close()
                assert server.established == 0
    finally:
        trio.socket.set_custom_hostname_resolver(None)


async def test_tls_names_the_server_and_offers_http_1_1_only() -> None:
    authority = trustme.CA()
    for_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(for_server)
    for_server.set_alpn_protocols(["h2", "http/1.1"])
    names: list[str | None] = []
    for_server.sni_callback = lambda _, name, __: names.append(name)
    for_client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(for_client)
    chosen: list[str | None] = []

    async def note(connection: Connection) -> None:
        await connection.receive_request()
        assert isinstance(connection.stream, trio.SSLStream)
        chosen.append(connection.stream.selected_alpn_protocol())
        await connection.send(WHOLE)

    with trio.fail_after(WAIT_S):
        async with open_raw_server(note, ssl_context=for_server) as server:
            url = server.url.replace("127.0.0.1", "localhost")
            async with Transport(
                httpx.URL(url), ssl_context=for_client, connect_timeout_s=WAIT_S, idle_max=1, idle_expiry_s=1
            ) as transport:
                await transport.handle_async_request(httpx.Request("POST", url, content=b""))
            async with Transport(
                httpx.URL(server.url), ssl_context=for_client, connect_timeout_s=WAIT_S, idle_max=1, idle_expiry_s=1
            ) as transport:
                with pytest.raises(TlsError, match=r"not valid for '127\.0\.0\.1'"):
                    await transport.handle_async_request(httpx.Request("POST", server.url, content=b""))
    assert (names, chosen) == (["localhost", None], ["http/1.1"])
    assert for_client.options & ssl.OP_NO_RENEGOTIATION


async def test_a_connection_with_tls_tells_its_peer_that_it_ends() -> None:
    ends: list[bytes] = []

    async def wait_for_the_end(connection: Connection) -> None:
        await connection.receive_request()
        await connection.send(WHOLE)
        assert isinstance(connection.stream, trio.SSLStream)
        ends.append(bytes(await connection.stream.receive_some()))

    for_server, for_client = tls_contexts()
    with trio.fail_after(WAIT_S):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                stream = trio.SSLStream(
                    await listeners[0].accept(), for_server, server_side=True
                )  # strict about the end
                await wait_for_the_end(Connection(stream, 0))
                await trio.aclose_forcefully(stream)

            nursery.start_soon(serve)
            url = f"https://127.0.0.1:{port}"
            async with Transport(
                httpx.URL(url), ssl_context=for_client, connect_timeout_s=WAIT_S, idle_max=1, idle_expiry_s=1
            ) as transport:
                response = await transport.handle_async_request(httpx.Request("POST", url, content=b""))
                assert await read(response.extensions[BODY]) == b"hi"
        await listeners[0].aclose()
    assert ends == [b""]
