"""One connection to a model server, plain or with TLS: it waits first, then reads.

On a stream of tokens nearly every read comes before its data. A read that is tried first costs a system call and an
exception for nothing, so :meth:`Connection.receive` waits until there is something. All other methods but
:meth:`Connection.wait_sendable` are synchronous; so a connection can be closed under any cancellation.
"""

import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

RECEIVED_BYTES_MAX = 64 * 1024
RELAYED_BYTES_MAX = 16 * 1024
"""How much :meth:`Connection.receive_nowait` takes: many connections are read in one step."""
_PLAIN_BYTES_MAX = 64 * 1024
"""How many bytes are encrypted before the result is sent."""


class Connection:
    """A plain connection.

    Args:
        sock: A connected socket that does not block. The connection closes it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.is_closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self.is_closed else self._sock.fileno()}>"

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def has_end(self) -> bool:
        """Whether the next receive returns the peer's end, or fails, without anything to read on the socket."""
        return False

    async def receive(self) -> bytes:
        """The next bytes; empty once the peer has ended its side. Always waits, so that other tasks run.

        Raises:
            OSError: The connection is broken.
        """
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv(RECEIVED_BYTES_MAX)
            except (BlockingIOError, InterruptedError):
                pass  # woken for nothing, which Linux may do

    async def wait_sendable(self, *, or_readable: bool) -> None:
        """Wait until the kernel takes more bytes, or until there is something to receive.

        Raises:
            OSError: The system cannot wait.
        """
        if not or_readable:
            await trio.lowlevel.wait_writable(self._sock)
            return
        # One task can wait for one direction only. The second task lives as long as this wait does.
        failures: list[OSError] = []
        async with trio.open_nursery() as nursery:

            async def wait(for_one: Callable[[socket.socket], Awaitable[None]]) -> None:
                try:
                    await for_one(self._sock)
                except OSError as error:  # out of the nursery it would come as a group
                    failures.append(error)
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, trio.lowlevel.wait_readable)
            await wait(trio.lowlevel.wait_writable)
        if failures:
            raise failures[0]

    def receive_nowait(self) -> bytes | None:
        """The bytes that have arrived; empty at the peer's end, None if there are none.

        Raises:
            OSError: The connection is broken.
        """
        try:
            return self._sock.recv(RELAYED_BYTES_MAX)
        except (BlockingIOError, InterruptedError):
            return None

    def send_nowait(self, data: memoryview) -> int:
        """Send as much as the kernel takes now, and return how many bytes that is.

        Raises:
            OSError: The connection is broken.
        """
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    def flush_nowait(self) -> bool:
        """Send what :meth:`send_nowait` has taken and kept. Returns whether nothing is left."""
        return True

    def is_usable(self) -> bool:
        """Whether the peer of a connection without a request has neither ended it nor sent anything."""
        try:
            return self.receive_nowait() is None
        except OSError:
            return False

    def close(self) -> None:
        """Close the connection at once. Idempotent."""
        if not self.is_closed:
            self.is_closed = True
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


class TlsConnection(Connection):
    """A connection with TLS; :meth:`do_handshake` comes first.

    A peer that ends its side without saying so in TLS is taken for one that has said so: many servers do that, and
    the framing of HTTP tells whether a body is whole.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_hostname: str) -> None:
        super().__init__(sock)
        self._received = ssl.MemoryBIO()
        self._to_send = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_hostname=server_hostname)
        self._unsent = memoryview(b"")
        self._has_ended = False
        self._failure: ssl.SSLError | None = None  # what came after the records that were returned

    async def do_handshake(self) -> None:
        """Agree on keys, and check the peer's certificate.

        Raises:
            OSError: (``ssl.SSLError`` among them.) The peer is not trusted, does not speak TLS, or has gone.
        """
        while True:
            try:
                self._tls.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                is_done = False
            except ssl.SSLError:
                self.flush_nowait()  # tells the peer why
                raise
            while not self.flush_nowait():
                await self.wait_sendable(or_readable=False)
            if is_done:
                return
            self._take(await super().receive())

    @property
    def has_end(self) -> bool:
        return self._has_ended or self._failure is not None

    async def receive(self) -> bytes:
        if self.has_end:
            await trio.lowlevel.checkpoint()
            return self._end()
        while True:
            self._take(await super().receive())
            if (plain := self._decrypt()) is not None:
                return plain

    def receive_nowait(self) -> bytes | None:
        if self.has_end:
            return self._end()
        while (data := super().receive_nowait()) is not None:
            self._take(data)
            if (plain := self._decrypt()) is not None:
                return plain
        return None

    def send_nowait(self, data: memoryview) -> int:
        if not self.flush_nowait():
            return 0
        taken = self._tls.write(data[:_PLAIN_BYTES_MAX])
        self.flush_nowait()
        return taken

    def flush_nowait(self) -> bool:
        while True:
            if not self._unsent:
                self._unsent = memoryview(self._to_send.read())
            if not self._unsent:
                return True
            sent = super().send_nowait(self._unsent)
            if not sent:
                return False
            self._unsent = self._unsent[sent:]

    def close(self) -> None:
        """Close the connection at once. The peer is told, if the kernel takes the words; its answer is not awaited."""
        if not self.is_closed:
            with suppress(OSError):  # among them ssl.SSLWantReadError: the peer has not answered
                self._tls.unwrap()
            with suppress(OSError):
                self.flush_nowait()
        super().close()

    def _take(self, data: bytes) -> None:
        if data:
            self._received.write(data)
        else:
            self._received.write_eof()

    def _end(self) -> bytes:
        """The peer's end. Raises: ssl.SSLError, if that is a record which cannot be read."""
        if self._failure is not None:
            raise self._failure
        return b""

    def _decrypt(self) -> bytes | None:
        """What the received bytes say; empty at the peer's end, None if they are no whole record, or none with data.

        A record that cannot be read is an error only after the records before it.
        """
        pieces: list[bytes] = []
        try:
            while not pieces or self._received.pending or self._tls.pending():
                piece = self._tls.read(RECEIVED_BYTES_MAX)
                if not piece:
                    self._has_ended = True
                    break
                pieces.append(piece)
        except ssl.SSLWantReadError:
            if not pieces:
                self.flush_nowait()  # TLS itself may have something to answer
                return None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._has_ended = True
        except ssl.SSLError as error:
            self.flush_nowait()  # tells the peer why
            if not pieces:
                raise
            self._failure = error
        return b"".join(pieces)
