"""The streams between the replicas of a service: TLS 1.3 over TCP, in which both ends have a certificate.

Trio's own ``SSLStream`` cannot do what these connections need: to send from a synchronous call (a turn's path goes to
the peer in the step that accepts it), to end the one side and read on, and to tell how the other side ended:

* **A goodbye** (TLS' ``close_notify``) says that the client behind the peer has left, or that an answer is complete.
* **An end without a goodbye** says that the peer stops or has died: the client may come back. So does a reset. An
  attacker who cuts a connection can only make the owner wait a moment for a client.

HTTP/1.1 frames its messages itself, so an end without a goodbye reads as an end here, and truncates no message unseen.
"""

import os
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

from service.errors import PeerUntrustedError

RECEIVE_BYTES = 64 * 1024
SEND_PIECE_BYTES = 64 * 1024
"""How many bytes are encrypted at once."""
GOODBYE_BYTES_MAX = 256 * 1024
"""Bytes that are read and dropped before a close: the kernel resets a connection that closes with unread bytes."""
HELLO_BYTES_MAX = 16 * 1024
KEEPALIVE = tuple(
    (getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)  # macOS has another name for the first one
)
"""An idle connection whose peer has vanished breaks after 5 s: 2 s without a byte, and 3 probes a second apart."""
UNHEARD_S = 5.0
"""How long a peer may acknowledge nothing of what was sent."""
_UNACKED_AND_HEARD = struct.Struct("=24xI28xI")
"""``tcpi_unacked`` and ``tcpi_last_ack_recv``, in milliseconds, of Linux' ``struct tcp_info``."""


class PeerObject(ssl.SSLObject):
    """The TLS of one connection that was accepted.

    Attributes:
        note_name: Given the name that the client asks for; the handshake ends with that. None if it goes on.
    """

    note_name: Callable[[str | None], None] | None = None

    def do_handshake(self) -> None:
        """As ssl's. A name that is not ASCII writes nothing to stderr, and fails the handshake.

        ssl decodes the name before it calls ``sni_callback``. If that fails, ssl reports an error that no code can
        catch, with a traceback and the bytes of the name, which anybody may choose.
        Source: https://github.com/python/cpython/blob/v3.11.0/Modules/_ssl.c (``_servername_callback``)
        """
        report = sys.unraisablehook
        sys.unraisablehook = partial(_report_all_but_names, report, threading.get_ident())
        try:
            super().do_handshake()
        finally:
            sys.unraisablehook = report


def _report_all_but_names(
    report: "Callable[[sys.UnraisableHookArgs], object]", thread: int, error: "sys.UnraisableHookArgs"
) -> None:
    """Report an error, unless it is one of a name: a UnicodeDecodeError in the thread that runs the handshake."""
    if threading.get_ident() != thread or not issubclass(error.exc_type, UnicodeDecodeError):
        report(error)


def end_after_name(tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> int | None:
    """For ``SSLContext.sni_callback``."""
    note_name = getattr(tls, "note_name", None)
    if note_name is None:
        return None
    note_name(name)
    return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME


async def read_hello(tcp: trio.socket.SocketType, context: ssl.SSLContext) -> tuple[bytes, str | None]:
    """Read the first message of a client, and send nothing. Returns its bytes, and the name that it asks for.

    The caller bounds the wait.

    Raises:
        PeerUntrustedError: The client does not speak TLS 1.3.
        trio.BrokenResourceError: The client has gone.
    """
    hello = b""
    names: list[str | None] = []
    incoming = ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    assert isinstance(tls, PeerObject)
    tls.note_name = names.append
    while True:
        data = await tcp.recv(HELLO_BYTES_MAX - len(hello)) if len(hello) < HELLO_BYTES_MAX else b""
        if not data:
            raise trio.BrokenResourceError("the client has gone")
        hello += data
        incoming.write(data)
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            if not names:
                is_name = error.reason == "CALLBACK_FAILED"  # see PeerObject
                raise PeerUntrustedError("the name is not ASCII" if is_name else reason_of(error)) from error
        return hello, names[0] if names else None


class TlsStream:
    """One end of a connection between replicas. The handshake is run by the first call that needs it.

    Args:
        tcp: A connected socket, which this stream owns.
        context: Made by :class:`~service.cluster.peer_certificates.PeerCertificates`.
        server_name: The instance that a client asks for; None on the side that listens.
        received: Bytes that were read from the socket already.

    Attributes:
        said_goodbye: Whether the peer has said goodbye.
    """

    def __init__(
        self,
        tcp: trio.socket.SocketType,
        context: ssl.SSLContext,
        *,
        server_name: str | None = None,
        received: bytes = b"",
    ) -> None:
        self.socket = tcp
        self.said_goodbye = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(received)
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self._unsent = bytearray()
        self._ahead = b""  # decrypted already
        self._has_ended = self._is_broken = self._is_ready = False
        self._handshaking = trio.Lock()

    def __repr__(self) -> str:
        state = "closed" if self.socket.fileno() < 0 else "open" if self._is_ready else "in handshake"
        return f"<TlsStream {self.socket.fileno()}: {state}>"

    # The handshake

    async def do_handshake(self) -> None:
        """Agree on keys, each side with the certificate of the other. Has no effect the second time.

        Raises:
            PeerUntrustedError: The certificate of one side is not accepted by the other.
            trio.BrokenResourceError: The peer has gone.
        """
        async with self._handshaking:
            while not self._is_ready:
                try:
                    self._tls.do_handshake()
                    self._is_ready = True
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError as error:
                    self._flush_now()  # the alert that tells the peer why
                    raise PeerUntrustedError(reason_of(error)) from error
                await self._flush()
                if not self._is_ready and not await self._receive():
                    raise trio.BrokenResourceError("the peer has gone during the handshake")

    @property
    def binding(self) -> bytes:
        """What only the two ends of this very connection have in common: the client's ``Finished`` message.

        It is a digest of the whole handshake, both certificates included. No session is ever resumed
        (``num_tickets`` is 0), so no other connection has the same.
        Source: https://www.rfc-editor.org/rfc/rfc8446#section-4.4.4. Python's ssl has no ``tls-exporter`` (RFC 9266).
        """
        finished = self._tls.get_channel_binding("tls-unique")
        assert self._is_ready
        assert finished
        return finished

    def selected_alpn_protocol(self) -> str | None:
        return None

    # Input

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what the peer sends next; empty once it has ended its side, with a goodbye or without.

        Raises:
            trio.BrokenResourceError: The connection was reset, or its peer has vanished.
            trio.ClosedResourceError
        """
        await self.do_handshake()
        await trio.lowlevel.checkpoint_if_cancelled()
        bytes_max = max_bytes or RECEIVE_BYTES
        while not (data := self._ahead or self._decrypted(bytes_max)) and not self._has_ended:
            await self._receive()
        self._ahead = data[bytes_max:]
        return data[:bytes_max]

    def _decrypted(self, bytes_max: int) -> bytes:
        """What has been received, without a wait."""
        pieces: list[bytes] = []
        while bytes_max and not self.said_goodbye:
            try:
                piece = self._tls.read(bytes_max)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                piece = b""
            except ssl.SSLError as error:
                self._has_ended = self._is_broken = True
                if not pieces:
                    raise _broken_by(error) from error
                break
            if not piece:
                self.said_goodbye = self._has_ended = True
                break
            pieces.append(piece)
            bytes_max -= len(piece)
        if self._outgoing.pending:  # the answer to a change of keys
            self._flush_now()
        return b"".join(pieces)

    async def _receive(self) -> bool:
        """Wait for more encrypted bytes. Returns False at their end."""
        while not self._has_ended:
            if self.socket.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self.socket.fileno())
            if self._receive_now():
                return True
        return False

    def _receive_now(self) -> bool:
        """Take what the kernel has. Returns False if it has nothing now. Raises: trio.BrokenResourceError."""
        if self.socket.fileno() < 0:
            raise trio.ClosedResourceError
        try:
            data = os.read(self.socket.fileno(), RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._has_ended = self._is_broken = True
            raise trio.BrokenResourceError(error.strerror) from error
        if not data:
            self._has_ended = True
            return False
        self._incoming.write(data)
        return True

    def client_returns(self) -> bool:
        """Whether the peer has ended the connection without a goodbye. Reads what has arrived; waits for nothing."""
        if self.socket.fileno() < 0 or not self._is_ready:
            return False
        with suppress(trio.BrokenResourceError):
            for _ in range(GOODBYE_BYTES_MAX // RECEIVE_BYTES):
                self._ahead += self._decrypted(RECEIVE_BYTES)
                if self._has_ended or not self._receive_now():
                    break
            self._ahead += self._decrypted(RECEIVE_BYTES)
        return self._has_ended and not self.said_goodbye

    # Output

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; returns once the kernel has taken them. A call that was cancelled may have sent a part.

        Raises: As :meth:`receive_some`.
        """
        await self.do_handshake()
        view = memoryview(data)
        for start in range(0, len(view), SEND_PIECE_BYTES):
            self._encrypt(view[start : start + SEND_PIECE_BYTES])
            await self._flush()
        await trio.lowlevel.checkpoint_if_cancelled()

    def write_now(self, data: bytes) -> None:
        """Send a few bytes in this very step. What the kernel does not take goes in front of what is sent next.

        The handshake must be complete. A connection that is broken takes the bytes without an error.
        """
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._encrypt(data)
        self._flush_now()

    def _encrypt(self, data: bytes | memoryview) -> None:
        if self.socket.fileno() < 0:
            raise trio.ClosedResourceError
        try:
            while data:
                data = data[self._tls.write(data) :]
        except ssl.SSLError as error:
            raise _broken_by(error) from error

    async def _flush(self) -> None:
        while self._flush_now(raises=True):
            await trio.lowlevel.wait_writable(self.socket.fileno())

    def _flush_now(self, *, raises: bool = False) -> bool:
        """Send what the kernel takes now. Returns whether something is left."""
        self._unsent += self._outgoing.read()
        while self._unsent:
            if self.socket.fileno() < 0:
                if raises:
                    raise trio.ClosedResourceError
                return False
            try:
                del self._unsent[: os.write(self.socket.fileno(), self._unsent)]
            except BlockingIOError:
                return True
            except OSError as error:
                self._is_broken = True
                if raises:
                    raise trio.BrokenResourceError(error.strerror) from error
                return False
        return False

    # The end

    def cut(self) -> None:
        """End both directions without a goodbye: the peer has vanished. Those who read and write see the end."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def send_eof(self) -> None:
        """End this side without a goodbye: this process stops. The other side may still be read."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def leave(self) -> None:
        """Say goodbye and close, without a wait. Idempotent."""
        if self.socket.fileno() < 0:
            return
        if self._is_ready and not self._is_broken:
            with suppress(ssl.SSLError):
                self._tls.unwrap()
            if self._flush_now():
                abort(self.socket)  # the peer takes nothing: an end without a goodbye would not be seen either
                return
            self.send_eof()
            self._drop_unread()
        self.socket.close()

    def _drop_unread(self) -> None:
        dropped = 0
        with suppress(OSError):
            while dropped < GOODBYE_BYTES_MAX and (data := os.read(self.socket.fileno(), RECEIVE_BYTES)):
                dropped += len(data)

    async def aclose(self) -> None:
        """Send what is left, say goodbye and close. A cancelled close closes at once."""
        try:
            if self._is_ready and not self._is_broken and self.socket.fileno() >= 0:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._flush()
        finally:
            self.leave()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> "TlsStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def keep_alive(tcp: trio.socket.SocketType) -> None:
    """Have the kernel notice on an idle connection that its peer has vanished, and send small pieces at once."""
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        tcp.setsockopt(socket.IPPROTO_TCP, option, value)


def is_unheard(tcp: trio.socket.SocketType) -> bool:
    """Whether the peer has acknowledged nothing for :data:`UNHEARD_S`, though something was sent to it.

    ``TCP_USER_TIMEOUT`` would end a connection whose peer lives and does not read for this time, too: it counts the
    probes of a closed window (measured on Linux 6.18). Clients may read slowly, so only bytes on their way count here.
    """
    try:
        unacked, heard_ms = _UNACKED_AND_HEARD.unpack(
            tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED_AND_HEARD.size)
        )
    except (OSError, struct.error):  # closed, or a kernel that does not tell
        return False
    return bool(unacked and heard_ms > UNHEARD_S * 1000)


def abort(tcp: trio.socket.SocketType) -> None:
    """Close a socket, and forget what was not sent."""
    with suppress(OSError):
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    tcp.close()


def reason_of(error: ssl.SSLError) -> str:
    """Why a certificate is not accepted, in OpenSSL's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.reason or str(error)).replace("_", " ").lower()


def _broken_by(error: ssl.SSLError) -> Exception:
    """The error of a connection that has broken. With TLS 1.3 a client learns late that it is not accepted."""
    reason = error.reason or ""
    if "ALERT" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")):
        return PeerUntrustedError(reason_of(error))
    return trio.BrokenResourceError(reason_of(error))
