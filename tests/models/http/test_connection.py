"""A connection with TLS, against TLS by hand: what comes in which piece."""

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from service.models.http.body import UnsizedBody
from service.models.http.connection import TlsConnection
from service.models.http.read_poller import open_read_poller
from service.models.http.transport import ResponseBody
from tests.models.upstream import WAIT_S, tls_contexts


class Peer:
    """The server's side; its words are sent when :meth:`send` is called, all in one piece or cut."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._received, self._to_send, server_side=True)

    async def do_handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.send()
                await trio.lowlevel.wait_readable(self._sock)
                self._received.write(self._sock.recv(65536))
            else:
                return

    def say_end(self) -> None:
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()

    def take_words(self) -> bytes:
        return self._to_send.read()

    def send(self, data: bytes | None = None) -> None:
        self._sock.sendall(self.take_words() if data is None else data)


@asynccontextmanager
async def open_tls() -> AsyncIterator[tuple[TlsConnection, Peer]]:
    """Both sides after their handshake; the server's tickets are not sent yet."""
    for_server, for_client = tls_contexts()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = TlsConnection(ours, for_client, server_hostname="127.0.0.1")
    with trio.fail_after(WAIT_S), theirs:
        peer = Peer(theirs, for_server)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.do_handshake)
                await peer.do_handshake()
            yield connection, peer
        finally:
            connection.close()


async def test_the_end_that_comes_with_the_last_data_is_told_after_it() -> None:
    """The peer has ended TLS and leaves the connection beneath open: nothing is waited for."""
    async with open_tls() as (connection, peer):
        peer.tls.write(b"last")
        peer.say_end()
        peer.send()
        assert await connection.receive() == b"last"
        assert await connection.receive() == b""
        assert connection.receive_nowait() == b""
        assert not connection.is_usable()


async def test_tickets_that_come_late_do_not_make_a_connection_unusable() -> None:
    async with open_tls() as (connection, peer):
        assert connection.is_usable()
        tickets = peer.take_words()
        assert tickets
        peer.send(tickets[:5])
        assert connection.is_usable()
        peer.send(tickets[5:])
        assert connection.is_usable()
        peer.tls.write(b"unasked")
        peer.send()
        assert not connection.is_usable()


async def test_a_record_in_pieces_is_waited_for_and_several_records_are_one_piece() -> None:
    async with open_tls() as (connection, peer):
        peer.tls.write(b"a")
        peer.tls.write(b"b")
        words = peer.take_words()
        got: list[bytes] = []

        async def receive() -> None:
            got.append(await connection.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            peer.send(words[:-40])
            await trio.testing.wait_all_tasks_blocked()
            peer.send(words[-40:])
        if got == [b"a"]:  # the cut was within the second record
            await receive()
        assert b"".join(got) == b"ab"
        peer.tls.write(b"c" * 10)
        peer.tls.write(b"d" * 40_000)
        peer.send()
        assert await connection.receive() == b"c" * 10 + b"d" * 40_000


async def test_relaying_ends_with_the_peer_s_end_though_nothing_is_left_to_read() -> None:
    taken: list[bytes] = []
    async with open_tls() as (connection, peer), open_read_poller() as poller:
        body = ResponseBody(connection, UnsizedBody(), keeper=None, poller=poller)
        peer.tls.write(b"last")
        peer.say_end()
        peer.send()
        await body.relay(lambda piece: not taken.append(piece))  # type: ignore[func-returns-value]
        assert taken == [b"last"]
        assert await body.receive() == b""


@pytest.mark.parametrize("now", [False, True])
async def test_the_records_before_a_broken_one_are_returned_first(now: bool) -> None:
    """A model's last words come, also where the line breaks within the same read."""

    async def receive() -> bytes | None:
        return connection.receive_nowait() if now else await connection.receive()

    async with open_tls() as (connection, peer):
        peer.tls.write(b"good")
        good = peer.take_words()
        peer.tls.write(b"text")
        broken = bytearray(peer.take_words())
        broken[-1] ^= 1
        peer.send(good + broken)
        await trio.lowlevel.wait_readable(connection.fileno())
        assert await receive() == b"good"
        assert connection.has_end
        for _ in range(2):
            with pytest.raises(ssl.SSLError):
                await receive()
        assert not connection.is_usable()


async def test_a_record_that_was_changed_breaks_the_connection() -> None:
    async with open_tls() as (connection, peer):
        peer.tls.write(b"text")
        words = bytearray(peer.take_words())
        words[-1] ^= 1
        peer.send(bytes(words))
        caught: list[OSError] = []
        try:
            await connection.receive()
        except OSError as error:
            caught.append(error)
        assert caught
