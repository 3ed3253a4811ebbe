"""Answers that their clients do not read: they are given up after a deadline, on HTTP/1 and HTTP/2, also under TLS.

hypercorn waits for such a client without a bound, and the answer is in memory meanwhile. What counts is progress: an
answer is given up once its client has taken no byte of it for ``unread_timeout_s``. So that a few bytes now and then do
not hold an answer for hours, it is also given up once its client has waited for longer than :data:`BYTES_A_SECOND_MIN`
allow, and ``unread_timeout_s`` more: an answer of 1 MiB has 17 minutes.
TCP counts the bytes that a client has taken; the server's own writes do not show it, because the kernel takes bytes in
large pieces. On HTTP/2 a client may read the connection and leave a stream without a window: then the stream is reset.
A connection that takes no bytes at all, and is full or has no window of its own, ends.

Event streams are no answers: they wait. But one that says so (``ENDS_UNREAD``) ends like an answer. It has no end of
its own and may tell little, so what counts for it is also what the kernel and the window hold back: a client that is
away takes none of it, long before the stream itself has to wait.
Proven by ``tests/hosting/hypercorn/test_unread_answers.py``.
"""

import fcntl
import socket
import struct
import termios
from array import array
from contextlib import suppress
from typing import Self

import h2.exceptions
import structlog
import trio
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.http_stream import HTTPStream
from quart import Quart

from service.hosting.hypercorn.connections import Connection
from service.hosting.hypercorn.http1_exchange import ExchangeConnection, Http1Exchange

logger = structlog.get_logger("lastcall.connections")

_UNREAD_ANSWERS = "lastcall.unread_answers"
BYTES_A_SECOND_MIN = 1024
"""The least speed at which a client reads each of its answers, on average."""
LOOKS = 4
"""Looks in a row without progress after which an answer is given up. After a freeze of this process there is one look,
before the bytes that arrived meanwhile are read, and the others come in their time."""
_BEFORE_BYTES = 64 * 1024
_BYTES_ACKED = struct.Struct("=120xQ")
"""``tcpi_bytes_acked`` in Linux' ``struct tcp_info``."""


class Http2Stream:
    """The stream of an answer on HTTP/2."""

    def __init__(self, connection: Connection, protocol: H2Protocol, stream_id: int) -> None:
        self._connection = connection
        self._protocol = protocol
        self._stream_id = stream_id

    @property
    def left_bytes(self) -> int:
        """What hypercorn has still to send."""
        buffer = self._protocol.stream_buffers.get(self._stream_id)
        return 0 if buffer is None else len(buffer.buffer)

    def has_window(self) -> bool:
        try:
            return self._protocol.connection.local_flow_control_window(self._stream_id) > 0
        except h2.exceptions.ProtocolError:  # the stream is closed
            return True

    def connection_is_unread(self, *, since: tuple[int, ...]) -> bool:
        """Whether the client has taken nothing from the whole connection since the first of the looks.

        At a single look a connection whose other streams move is often full, too.
        """
        progress = _progress_of(self._connection.socket)
        return self._connection.is_stalled_as_a_whole and progress in ((), since)

    def reset(self) -> None:
        self._connection.reset_stream(self._stream_id)


class Answer:
    """An answer on its way to its client.

    Args:
        is_endless: Whether it is an event stream, which ends only because its client does not read.

    Attributes:
        pieces: How many pieces of it hypercorn has taken, its head included.
    """

    def __init__(
        self,
        connection: Connection | ExchangeConnection,
        stream: Http2Stream | None = None,
        *,
        is_endless: bool = False,
    ) -> None:
        self.pieces = 0
        self._connection = connection
        self._stream = stream
        self._is_endless = is_endless
        self._is_waiting = False
        self._seen: tuple[int, ...] = ()
        self._connection_seen: tuple[int, ...] = ()
        self._looks = 0
        # What the client has to read before this answer: what the kernel holds, and a piece of another stream.
        self._bytes = _unread_bytes_of(connection.socket) + _BEFORE_BYTES
        self._waits = 0

    def __repr__(self) -> str:
        return f"<Answer: {self.pieces} pieces sent, {self._looks} looks without progress of {self._waits}>"

    @classmethod
    def begun_by(cls, send: object, *, is_endless: bool = False) -> Self | None:
        """Return the answer that a request's ASGI ``send`` has begun; None where a server other than ours sends it."""
        stream = getattr(send, "__self__", None)
        if isinstance(stream, Http1Exchange):
            return cls(stream.connection, is_endless=is_endless)
        protocol = getattr(getattr(stream, "send", None), "__self__", None)
        connection = getattr(getattr(protocol, "send", None), "__self__", None)
        if isinstance(stream, HTTPStream) and isinstance(protocol, H2Protocol) and isinstance(connection, Connection):
            return cls(connection, Http2Stream(connection, protocol, stream.stream_id), is_endless=is_endless)
        return None

    def waiting(self, size: int = 0) -> Self:
        """The client's time: around the send of the head, or of one piece of ``size`` bytes."""
        self._bytes += size
        return self

    def __enter__(self) -> None:
        self._is_waiting = True

    def __exit__(self, *_: object) -> None:
        self._is_waiting = False
        self.pieces += 1

    def is_unread(self, *, bytes_a_look: float) -> bool:
        """Look once. Whether the client has taken no byte since :data:`LOOKS` looks, or takes too few.

        Args:
            bytes_a_look: The bytes that a client takes from look to look at least, on average.
        """
        self._waits += self._is_waiting  # and no time in which the application makes the next piece
        if (self._waits - LOOKS) * bytes_a_look > self._bytes:
            return True
        taken = self._taken()
        if not taken or taken != self._seen:
            self._seen, self._looks = taken, 0
            self._connection_seen = _progress_of(self._connection.socket)
            return False
        self._looks += 1
        return self._looks >= LOOKS

    def give_up(self) -> None:
        """End the stream on HTTP/2, or the connection. The request ends then, too."""
        if self._stream is None or self._stream.connection_is_unread(since=self._connection_seen):
            self._connection.abort()
        else:
            self._stream.reset()

    def _taken(self) -> tuple[int, ...]:
        """What grows or shrinks with each byte that the client takes; empty if nothing waits for the client."""
        if self._is_endless:
            return self._held_back()
        if not self._is_waiting:
            return ()
        if self._stream is None:
            return (self.pieces, *_progress_of(self._connection.socket))
        # A head, or a stream with a window, waits only for its turn on a connection that is read.
        waits_for_turn = self.pieces == 0 or self._stream.has_window()
        progress = _progress_of(self._connection.socket) if waits_for_turn else ()
        return (self.pieces, self._stream.left_bytes, *progress)

    def _held_back(self) -> tuple[int, ...]:
        """What changes once the client takes a byte of what waits for it, and by nothing else; empty if none waits."""
        if self._stream is not None and self._stream.left_bytes and not self._stream.has_window():
            return (self._bytes - self._stream.left_bytes,)
        unread_bytes, *taken = _progress_of(self._connection.socket) or (0,)
        if taken:
            return tuple(taken) if unread_bytes else ()
        return (self.pieces, unread_bytes) if self._is_waiting else ()  # the kernel counts only on TCP


class UnreadAnswers:
    """The answers that are being sent, and the loop that gives up those that are not read.

    Args:
        timeout_s: How long a client may take no byte.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._answers: set[Answer] = set()

    def __repr__(self) -> str:
        return f"<UnreadAnswers: {len(self._answers)} on their way>"

    def add(self, answer: Answer) -> None:
        self._answers.add(answer)

    def discard(self, answer: Answer) -> None:
        """Forget an answer that has ended. Idempotent."""
        self._answers.discard(answer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The loop, a child of the hosting. A failure of it ends the process."""
        task_status.started()
        while True:
            await trio.sleep(self._timeout_s / LOOKS)
            self.look()

    def look(self) -> int:
        """Look at each answer once, and give up those that are not read. Returns their number."""
        bytes_a_look = BYTES_A_SECOND_MIN * self._timeout_s / LOOKS
        unread = [answer for answer in self._answers if answer.is_unread(bytes_a_look=bytes_a_look)]
        for answer in unread:
            self.discard(answer)
            answer.give_up()
        if unread:
            logger.info("answers were given up: their clients did not read them, or too slowly", count=len(unread))
        return len(unread)


def watch_unread_answers(app: Quart, *, timeout_s: float) -> UnreadAnswers:
    """Attach the set of unread answers to an application: its requests add their answers. The caller runs the loop."""
    answers = app.extensions[_UNREAD_ANSWERS] = UnreadAnswers(timeout_s=timeout_s)
    return answers


def unread_answers_of(app: Quart) -> UnreadAnswers | None:
    """Return the set of an application that has one."""
    return app.extensions.get(_UNREAD_ANSWERS)


def _progress_of(sock: trio.socket.SocketType) -> tuple[int, ...]:
    """Numbers that change when the peer takes bytes: on TCP the bytes taken so far, and those that are still unread."""
    if sock.fileno() < 0:
        return ()
    unread_bytes = _unread_bytes_of(sock)
    try:
        if sock.family == socket.AF_UNIX:
            return (unread_bytes,)
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return (unread_bytes, *_BYTES_ACKED.unpack(info))
    except (OSError, struct.error):  # the connection is broken, or the kernel does not count
        return (unread_bytes,)


def _unread_bytes_of(sock: trio.socket.SocketType) -> int:
    """The bytes that the kernel still holds for the peer."""
    unread = array("i", [0])
    with suppress(OSError, ValueError):  # the connection is broken or closed
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, unread)
    return unread[0]
