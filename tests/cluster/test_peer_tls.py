"""Streams between replicas: two ends of a TCP connection in one process."""

import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from service.cluster import peer_tls
from service.cluster.peer_certificates import PeerCertificates
from service.cluster.peer_proof import check_peer, prove_to_owner
from service.cluster.peer_tls import TlsStream, keep_alive, read_hello
from service.errors import PeerUntrustedError
from tests.cluster.certificates import peer_certificates

SECRET = b"s" * 32
CAP_S = 60


@asynccontextmanager
async def open_sockets() -> AsyncIterator[tuple[trio.socket.SocketType, trio.socket.SocketType]]:
    """Two ends of a TCP connection."""
    with trio.fail_after(CAP_S), trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        with trio.socket.socket() as one:
            await one.connect(listener.getsockname())
            other, _ = await listener.accept()
            with other:
                yield one, other


@asynccontextmanager
async def open_pair(
    theirs: PeerCertificates, ours: PeerCertificates | None = None
) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    """A client's end and a server's end, with their handshakes to come."""
    async with open_sockets() as (one, other):
        yield TlsStream(one, theirs.client, server_name="name"), TlsStream(other, (ours or theirs).server)


@asynccontextmanager
async def open_ready(certificates: PeerCertificates) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    async with open_pair(certificates) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            nursery.start_soon(server.do_handshake)
        yield client, server


@pytest.fixture
def certificates(tmp_path: Path) -> PeerCertificates:
    return peer_certificates(tmp_path / "one")


async def test_bytes_arrive_in_order_in_both_directions_at_once(certificates: PeerCertificates) -> None:
    sent = os.urandom(3 * 1024 * 1024 + 17)
    async with open_pair(certificates) as (client, server), trio.open_nursery() as nursery:

        async def read_all(stream: TlsStream) -> None:
            got = bytearray()
            while len(got) < len(sent):
                got += await stream.receive_some()
            assert got == sent

        for stream in (client, server):
            nursery.start_soon(stream.send_all, sent)
            nursery.start_soon(read_all, stream)


async def test_no_more_bytes_are_returned_than_were_asked_for(certificates: PeerCertificates) -> None:
    async with open_ready(certificates) as (client, server):
        await client.send_all(b"abcdef")
        assert await server.receive_some(2) == b"ab"
        assert not server.client_returns(), "the connection is open"
        assert await server.receive_some(2) == b"cd"
        assert await server.receive_some(20) == b"ef"


async def test_what_is_written_in_one_step_goes_in_front_of_what_is_sent_later(certificates: PeerCertificates) -> None:
    async with open_ready(certificates) as (client, server), trio.open_nursery() as nursery:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(6):  # more than the kernel takes
            server.write_now(b"a" * 16_000)
        nursery.start_soon(server.send_all, b"b")
        await wait_all_tasks_blocked()
        got = b""
        while not got.endswith(b"b"):
            got += await client.receive_some()
        assert got == b"a" * 96_000 + b"b"


@pytest.mark.parametrize("unread", [False, True], ids=["all is read", "something is unread"])
async def test_a_client_that_leaves_says_goodbye(unread: bool, certificates: PeerCertificates) -> None:
    async with open_ready(certificates) as (client, server):
        if unread:
            await server.send_all(b"x" * 1000)
        client.leave()
        client.leave()
        assert not server.client_returns()
        assert await server.receive_some() == b""
        assert server.said_goodbye


async def test_a_client_that_leaves_an_owner_that_takes_nothing_is_aborted(
    certificates: PeerCertificates,
) -> None:
    async with open_ready(certificates) as (client, server):
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(100):
            client.write_now(b"x" * 16_000)
        client.leave()
        assert client.socket.fileno() < 0
        assert server.client_returns(), "this end cannot say better"


async def test_a_process_that_stops_ends_its_side_without_a_goodbye_and_reads_on(
    certificates: PeerCertificates,
) -> None:
    async with open_ready(certificates) as (client, server):
        await client.send_all(b"the request")
        client.send_eof()
        assert server.client_returns()
        assert await server.receive_some() == b"the request", "a look takes nothing away"
        assert await server.receive_some() == b""
        assert not server.said_goodbye
        await server.send_all(b"the end")
        assert await client.receive_some() == b"the end"
        await server.aclose()
        assert await client.receive_some() == b""
        assert client.said_goodbye
        client.leave()


@pytest.mark.parametrize("resets", [False, True])
async def test_a_process_that_dies_says_no_goodbye(resets: bool, certificates: PeerCertificates) -> None:
    async with open_ready(certificates) as (client, server):
        if resets:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()
        await trio.lowlevel.wait_readable(server.socket.fileno())
        assert server.client_returns()
        assert server.client_returns(), "it can be asked again"
        if resets:
            assert await server.receive_some() == b""
        server.socket.close()
        assert not server.client_returns(), "this process has closed the connection"


@pytest.mark.parametrize("reads", [True, False])
async def test_a_wait_ends_when_another_task_closes_the_stream(reads: bool, certificates: PeerCertificates) -> None:
    async with open_ready(certificates) as (client, _), trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError)):
                await (client.receive_some() if reads else client.send_all(b"x" * 20_000_000))

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        client.leave()


async def test_a_cancelled_close_closes(certificates: PeerCertificates) -> None:
    async with open_ready(certificates) as (client, _):
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.aclose()
        assert client.socket.fileno() < 0


@pytest.mark.parametrize("end", ["client", "server"])
async def test_a_handshake_that_is_cancelled_may_go_on(end: str, certificates: PeerCertificates) -> None:
    async with open_pair(certificates) as (client, server):
        cancelled, other = (client, server) if end == "client" else (server, client)
        with trio.move_on_after(0.01) as bound:
            await cancelled.do_handshake()
        assert bound.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelled.do_handshake)
            nursery.start_soon(other.do_handshake)
        assert client.binding == server.binding


async def test_a_proof_is_bound_to_its_connection(certificates: PeerCertificates) -> None:
    """A process in between, with a certificate of its own, passes on each byte of the proof of both ends."""

    async def relay(source: TlsStream, to: TlsStream) -> None:
        with suppress(trio.ClosedResourceError):  # by the other direction
            while data := await source.receive_some():
                await to.send_all(data)
            to.leave()

    async with (
        open_pair(certificates) as (client, between),
        open_pair(certificates) as (onwards, server),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(relay, between, onwards)
        nursery.start_soon(relay, onwards, between)
        results: list[object] = []

        async def check() -> None:
            results.append(await check_peer(server, SECRET, address="x"))

        nursery.start_soon(check)
        assert not await prove_to_owner(client, SECRET, address="x")
        client.leave()
        await wait_all_tasks_blocked()
        assert results == [None]
        nursery.cancel_scope.cancel()
    async with open_pair(certificates) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: check_peer(server, SECRET, address="y"))
        assert await prove_to_owner(client, SECRET, address="x")


async def refused(theirs: PeerCertificates, ours: PeerCertificates) -> tuple[str, str]:
    """Let two ends meet that do not fit; returns the reason that each of them tells."""
    reasons = {"client": "", "server": ""}
    async with open_pair(theirs, ours) as (client, server), trio.open_nursery() as nursery:

        async def run(stream: TlsStream, name: str) -> None:
            try:
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n") if name == "client" else await stream.do_handshake()
                assert await stream.receive_some() == b"", "not one byte"
            except PeerUntrustedError as error:
                reasons[name] = error.reason
            except trio.BrokenResourceError:
                reasons[name] = "gone"
            stream.leave()

        nursery.start_soon(run, client, "client")
        nursery.start_soon(run, server, "server")
    return reasons["client"], reasons["server"]


async def test_a_certificate_of_another_authority_is_accepted_by_neither_side(
    certificates: PeerCertificates, tmp_path: Path
) -> None:
    strange = peer_certificates(tmp_path / "strange", signed_by="another", trusts=["another", "ours"])
    client, server = await refused(strange, certificates)
    assert "unknown ca" in client
    assert "self-signed" in server or "unable to get" in server
    client, server = await refused(certificates, strange)
    assert "self-signed" in client or "unable to get" in client
    assert "unknown ca" in server


async def test_a_client_without_a_certificate_is_refused(certificates: PeerCertificates) -> None:
    async with open_sockets() as (one, other), trio.open_nursery() as nursery:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        client, server = TlsStream(one, context, server_name="name"), TlsStream(other, certificates.server)

        async def serve() -> None:
            with pytest.raises(PeerUntrustedError, match="not accepted") as told:
                await server.do_handshake()
            assert "did not return a certificate" in told.value.reason
            server.leave()

        nursery.start_soon(serve)
        await client.do_handshake()
        with pytest.raises(PeerUntrustedError) as told:
            await client.receive_some()
        assert "certificate required" in told.value.reason


async def test_an_older_tls_is_refused(certificates: PeerCertificates) -> None:
    async with open_sockets() as (one, other), trio.open_nursery() as nursery:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2

        async def serve() -> None:
            with pytest.raises(PeerUntrustedError):
                await read_hello(other, certificates.server)
            other.close()

        nursery.start_soon(serve)
        with pytest.raises(trio.BrokenResourceError):
            await TlsStream(one, context, server_name="name").do_handshake()


async def test_the_name_that_a_client_asks_for_is_read_however_its_message_arrives(
    certificates: PeerCertificates,
) -> None:
    async with open_sockets() as (one, other), trio.open_nursery() as nursery:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = certificates.client.wrap_bio(incoming, outgoing, server_hostname="lastcall-" + "0" * 32)
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        hello = outgoing.read()

        async def drip() -> None:
            for at in range(len(hello)):
                await one.send(hello[at : at + 1])
                await wait_all_tasks_blocked()

        nursery.start_soon(drip)
        assert await read_hello(other, certificates.server) == (hello, "lastcall-" + "0" * 32)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"", b"\x16\x03\x01\xff\xff" + b"x" * 30_000, b"\0" * 100]
)
async def test_what_is_no_tls_is_refused_without_a_byte(data: bytes, certificates: PeerCertificates) -> None:
    async with open_sockets() as (one, other):
        await trio.SocketStream(one).send_all(data)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises((PeerUntrustedError, trio.BrokenResourceError)):
            await read_hello(other, certificates.server)
        other.close()
        try:
            assert await one.recv(1) == b""
        except ConnectionResetError:
            pass


def unacknowledged(stream: TlsStream) -> int:
    size = peer_tls._UNACKED_AND_HEARD.size
    unacked, _ = peer_tls._UNACKED_AND_HEARD.unpack(stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size))
    return int(unacked)


async def test_a_peer_that_reads_slowly_is_heard_and_one_that_vanished_is_not(
    certificates: PeerCertificates,
) -> None:
    """A closed window is acknowledged. ``TCP_USER_TIMEOUT`` would take such a peer for one that has vanished."""
    async with open_ready(certificates) as (client, server), trio.open_nursery() as nursery:
        keep_alive(server.socket)
        nursery.start_soon(server.send_all, b"x" * 20_000_000)
        await wait_all_tasks_blocked()
        while unacknowledged(server):  # noqa: ASYNC110  no event tells it
            await trio.sleep(0.01)
        assert nursery.child_tasks, "all that was sent is acknowledged, and the rest waits"
        assert not peer_tls.is_unheard(server.socket)
        nursery.cancel_scope.cancel()
        client.leave()
    assert not peer_tls.is_unheard(server.socket), "a socket that is closed"
