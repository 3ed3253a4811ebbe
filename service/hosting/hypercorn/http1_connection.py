"""A connection on HTTP/1.1: one task reads requests, and the task of each request writes its response.

hypercorn takes a channel, two tasks and four writes for a request, and h11 for each of them. Here h11 parses the
requests, and that is all.

* The next request is read after the response to the one before. What the client sends meanwhile stays unread.
* An idle connection closes after ``keep_alive_timeout``, or when the server stops. A head that does not arrive whole
  counts as idle. One task for each connection sees to that; moving the deadline costs nothing.
* A connection without a request is kept for a moment while the server stops: to close it while its first request
  arrives would reset it.
* A client that closes its sending side after its request gets an answer, unless the request waits for a turn or
  streams a turn.
* Empty lines before a request are skipped (``request_parser``).
* No input holds the event loop: h11 works through all bytes of a call without a pause, so each call gets few bytes,
  and a head is bounded. Bytes for which h11's patterns would take long are refused before (``request_parser``).
* Sending is not shielded. A send that was cancelled may have sent a part, so the connection closes.
* No answer is lost by a close that this side has chosen: the last answer says so, this side stops sending, and what
  the client still sends is read and dropped until it closes, too. To close at once would reset the connection.
  Source: https://www.rfc-editor.org/rfc/rfc9112#section-9.6
  Proven by ``tests/hosting/hypercorn/test_http1_connection.py`` and ``test_connections.py``.
"""

import fcntl
import os
import select
import termios
import time
from array import array
from contextlib import suppress
from typing import Protocol, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState

from service.freezes import extended_when_late
from service.hosting.hypercorn.http1_exchange import Address, Http1Exchange, encode_refusal
from service.hosting.hypercorn.request_parser import RequestParser
from service.hosting.hypercorn.response_head import Fields

Stream = trio.SSLStream[trio.SocketStream]
"""A connection's stream, with TLS or without, in the type that hypercorn declares."""
FIRST_REQUEST_S = 0.05
"""How long a connection without a request is kept once the listeners close: a request may be on its way."""
UNREAD_POLL_INTERVAL_S = 0.005
UNREAD_POLLS_MAX = 200
"""Looks at a connection that is due to close and has unread bytes. Then its reader waits for a client that does not
read, or for an application that does not, and the connection is aborted."""
STOP_LINGER_S = 0.1
"""How long a client may go on sending after its last answer while the server stops; else the keep-alive time."""
CHECKPOINT_BYTES = 4096
RECEIVE_BYTES = 64 * 1024
HEAD_PIECE_BYTES = 4096
BODY_PIECE_BYTES = 16 * 1024
STEP_S = 0.002
"""How long a connection handles its input before other tasks get a turn."""
CLOSE_TIMEOUT_S = 1.0
"""Bound on the close of a connection with TLS. After it the connection is aborted."""
DISCARDED_BYTES_MAX = 1024 * 1024
"""Bytes that are read and dropped before a close: the kernel resets a connection that closes with unread bytes."""
_LINE_ENDS = b"\r\n"


class Http1Host(Protocol):
    """What a connection asks the server."""

    @property
    def closes_after_response(self) -> bool:
        """Whether the connection closes after its current response instead of waiting for a request."""

    @property
    def idle_grace_s(self) -> float:
        """How long an idle connection waits for a last request once idle connections close."""

    def closes_idle(self) -> bool:
        """Whether idle connections close already, because the server stops or others serve in its place."""

    async def wait_until_idle_close(self, *, within_s: float) -> None:
        """Return once :meth:`closes_idle`, or after this time."""


class ServerFields:
    """The fields that hypercorn adds to each response; they change once a second."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._second = 0
        self._fields: Fields = []

    def current(self) -> Fields:
        second = int(time.time())
        if second != self._second:
            self._second, self._fields = second, self.config.response_headers("h11")
        return self._fields


class Http1Connection:
    """One connection on HTTP/1.1.

    Attributes:
        stream: The client, with TLS or without.
        socket: The socket below.
        is_closed: Whether the connection was closed from this side.
    """

    def __init__(
        self,
        app: AppWrapper,
        context: WorkerContext,
        state: ConnectionState,
        stream: Stream,
        *,
        host: Http1Host,
        fields: ServerFields,
        client: Address,
        server: Address,
    ) -> None:
        self.config = fields.config
        self.stream = stream
        self.socket = socket_of(stream)
        self.is_closed = False
        self._app = app
        self._context = context
        self._state = state
        self._host = host
        self._fields = fields
        self._addresses = client, server
        self._is_plain = isinstance(stream, trio.SocketStream)
        self._parser = RequestParser(head_bytes_max=self.config.h11_max_incomplete_size)
        self._input = b""
        self._has_ended = False
        self._is_sending = False
        self._senders = trio.lowlevel.ParkingLot()
        self._is_broken = False
        self._has_ended_output = False
        self._client_closes = False
        self._requests = 0
        self._opened_at = self._idle_since = trio.current_time()
        self._is_idle = True
        self._became_idle: trio.Event | None = None
        self._step_began_at = 0.0
        self._keeping = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._exchange: Http1Exchange | None = None

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "idle" if self._is_idle else "busy"
        return f"<Http1Connection {self.socket.fileno()}: {state} after {self._requests} requests>"

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request."""
        return self._is_idle

    @property
    def takes_plain_bytes(self) -> bool:
        """Whether bytes go to the kernel as they are: without TLS."""
        return self._is_plain

    async def run(self) -> bytes | None:
        """Serve until the connection has ended. Returns the bytes with which another protocol begins, or None."""
        other: bytes | None = None
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._close_when_idle)
                other = await self._serve()
                if self._has_ended_output:
                    await self._discard_input()
                self._keeping.cancel()
                if other is None and (self._exchange is None or self._exchange.is_answered):
                    await self.close()
            # A request whose client has left ends first: it asks the socket how (``peer_listener.client_returns``).
            if other is None:
                await self.close()
        finally:
            self._exchange = None
            if other is None:
                self.is_closed = True
                self.socket.close()
        return other

    def abort(self) -> None:
        """Close the connection without a TLS close. The kernel still delivers the bytes that it has taken."""
        self.is_closed = True
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        self.socket.close()

    # Requests

    async def _serve(self) -> bytes | None:
        while (request := await self._next_request()) is not None:
            fields = list(request.headers)  # h11's own list makes a pair at each look
            if _asks_for_another_protocol(request, fields):
                return self._parser.received + self._input
            exchange = await self._begin(request, fields)
            del request, fields  # the exchange has what is needed of them for as long as the response takes
            if exchange is None:
                return None
            if not (await self._read_body(exchange) and await self._go_on_after(exchange)):
                await exchange.disconnect()
                return None
            self._exchange = None
            left, _ = self._parser.trailing_data
            self._input = left + self._input
            self._parser = RequestParser(head_bytes_max=self.config.h11_max_incomplete_size)
        return None

    async def _next_request(self) -> h11.Request | None:
        """Return the next request once its head has arrived; None if there will be none."""
        while await self._feed(HEAD_PIECE_BYTES):
            try:
                event = self._parser.next_event()
            except h11.RemoteProtocolError as error:
                await self.write_in_time(encode_refusal(error.error_status_hint, self._fields.current()))
                self._end_output()
                return None
            if isinstance(event, h11.Request):
                return event
            if event is not h11.NEED_DATA:
                return None
        return None

    async def _begin(self, request: h11.Request, request_fields: Fields) -> Http1Exchange | None:
        """Start the application's task for a request. Returns None if the connection ends before it."""
        self._is_idle = False
        self._requests += 1
        keeps_alive = _keeps_alive(request, request_fields)
        self._client_closes = not keeps_alive
        if self._parser.they_are_waiting_for_100_continue:
            fields = b"".join(b"%b: %b\r\n" % field for field in self._fields.current())
            await self.write_in_time(b"HTTP/1.1 100 \r\n" + fields + b"\r\n")
            if self._is_broken:
                return None
        client, server = self._addresses
        exchange = self._exchange = Http1Exchange(
            request,
            request.headers.raw_items() if self.config.h11_pass_raw_headers else request_fields,
            self,
            scheme="http" if self._is_plain else "https",
            client=client,
            server=server,
            state=self._state,
            keeps_alive=keeps_alive,
        )
        if self.config.server_names and not self._is_named(request_fields):
            await exchange.refuse(404)
            return exchange
        if self._context.max_requests is not None:
            await self._context.mark_request()
        assert self._nursery is not None
        self._nursery.start_soon(exchange.run, self._app)
        return exchange

    def _is_named(self, fields: Fields) -> bool:
        host = next((value for name, value in fields if name == b"host"), b"")
        return host.decode() in self.config.server_names

    async def _read_body(self, exchange: Http1Exchange) -> bool:
        """Give the body to the application. Returns False if the connection ends before the body does."""
        while True:
            if exchange.is_answered:
                return False
            try:
                event = self._parser.next_event()
            except h11.RemoteProtocolError as error:
                if not exchange.has_begun and not exchange.is_answered:
                    await exchange.refuse(error.error_status_hint)
                return False
            if isinstance(event, h11.Data):
                await exchange.queue.put({"type": "http.request", "body": bytes(event.data), "more_body": True})
            elif isinstance(event, h11.EndOfMessage):
                exchange.is_whole = True
                await exchange.queue.put({"type": "http.request", "body": b"", "more_body": False})
                return True
            elif event is not h11.NEED_DATA or not await self._feed(BODY_PIECE_BYTES):
                return False

    async def _discard_input(self) -> None:
        """Drop what the client still sends after its last answer, until it closes its side. The idle time bounds this.

        The bytes are read below TLS: their content does not matter.
        """
        discarded = 0
        with suppress(trio.ClosedResourceError, OSError):  # the connection was closed or reset
            while discarded < DISCARDED_BYTES_MAX and not self._has_ended:
                received = await self._receive_plain()
                self._has_ended = not received
                discarded += len(received)

    async def _go_on_after(self, exchange: Http1Exchange) -> bool:
        """Wait for the response or the client's leaving. Returns whether the connection goes on after the response."""
        while not (exchange.is_answered or self._is_broken):
            if self._is_ahead:
                await exchange.wait_over()
            elif (data := await self._receive()) is None:
                break
            elif data:
                self._input += data
            else:
                self._has_ended = True
                await exchange.queue.wait_over()
                break
        return exchange.is_answered and not (self.is_closed or self._is_broken or self._has_ended_output)

    @property
    def _is_ahead(self) -> bool:
        """Whether the client has sent bytes after its request. They wait, and the client is not watched meanwhile."""
        if not self._input and not self._parser.has_more:
            return False
        received = self._parser.trailing_data[0] + self._input
        return len(received) > HEAD_PIECE_BYTES or bool(received.strip(_LINE_ENDS))

    # Input

    async def _feed(self, bytes_max: int) -> bool:
        """Give the parser more input. Returns False if the connection is broken."""
        if not self._input and not self._has_ended:
            if self._requests and not self._is_idle and self._parser.their_state is h11.IDLE:
                self._note_idle()  # a part of a head has arrived together with the request before
            received = await self._receive()
            if received is None:
                return False
            self._input, self._has_ended = received, not received
        elif time.perf_counter() - self._step_began_at > STEP_S:
            await trio.lowlevel.checkpoint()
            self._step_began_at = time.perf_counter()
        piece = self._input[:bytes_max]
        self._input = self._input[bytes_max:]
        self._parser.receive_data(piece)
        return True

    async def _receive(self) -> bytes | None:
        """Return what the client sends next, empty at the end of its input; None if the connection is broken."""
        try:
            if self._is_plain and not self.config.read_timeout:
                data = await self._receive_plain()
            else:
                data = await self._receive_from_stream()
        except (trio.ClosedResourceError, trio.BrokenResourceError, trio.TooSlowError, OSError):
            return None
        self._step_began_at = time.perf_counter()
        return data

    async def _receive_plain(self) -> bytes:
        """Wait first: to try before would nearly always fail."""
        while True:
            if self.socket.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self.socket.fileno())
            with suppress(BlockingIOError):
                return os.read(self.socket.fileno(), RECEIVE_BYTES)

    async def _receive_from_stream(self) -> bytes:
        if not self.config.read_timeout:
            return bytes(await self.stream.receive_some(RECEIVE_BYTES))
        timeout_s = float(self.config.read_timeout)
        with trio.fail_after(timeout_s) as scope, extended_when_late(scope, timeout_s=timeout_s):
            return bytes(await self.stream.receive_some(RECEIVE_BYTES))

    # Output

    def server_fields(self) -> Fields:
        """The fields of the server, as in hypercorn's responses."""
        fields = self._fields.current()
        if self._requests >= self.config.keep_alive_max_requests:
            return [*fields, (b"connection", b"close")]
        return fields

    async def write(self, data: bytes) -> None:
        """Send bytes. Returns once the kernel has taken them; those to a client that has left are dropped.

        Several tasks may write: the bytes of each call stay together.
        """
        while self._is_sending and not self._is_broken:
            await self._senders.park()
        # Nearly always the kernel takes all bytes at once. Then Trio's checks protect nothing, and cost five times as
        # much as the system call.
        sent = self.write_now(data)
        if sent == len(data):
            if sent > CHECKPOINT_BYTES:
                await trio.lowlevel.cancel_shielded_checkpoint()  # a long replay lets other tasks run
            return
        if self.is_closed or self._is_broken:
            return
        self._is_sending = True
        try:
            await self.stream.send_all(data[sent:])
            self._is_sending = False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if self._exchange is not None:
                await self._exchange.disconnect()
        finally:
            # The client has left; or the send was cancelled, and a part may have been sent. The socket stays open for
            # the request, which asks it how its client has left.
            self._is_broken |= self._is_sending
            self._senders.unpark_all()

    async def write_in_time(self, data: bytes) -> None:
        """Send bytes that no request waits for. A client that takes none of them in the idle time is given up."""
        timeout_s = self.config.keep_alive_timeout
        with trio.move_on_after(timeout_s) as scope, extended_when_late(scope, timeout_s=timeout_s):
            await self.write(data)

    def write_now(self, data: bytes) -> int:
        """Send as many bytes as the kernel takes now; returns their number. 0 under TLS and while others are sent."""
        if not self._is_plain or self._is_sending:
            return 0
        try:
            return os.write(self.socket.fileno(), data)
        except OSError:  # the socket would block, or is broken or closed: Trio's send handles each case
            return 0

    # The end

    async def note_answered(self, exchange: Http1Exchange) -> None:
        """Wait for the next request, or close."""
        closes_soon = self._host.closes_after_response
        if self._is_broken:
            await self.close()
        elif exchange.is_whole and exchange.keeps_alive and not closes_soon:
            if not self._is_ahead:
                self._note_idle()
        elif exchange.is_whole and (self._client_closes or closes_soon) and not (self._is_ahead or self.has_unread()):
            await self.close()
        else:
            self._end_output()

    def _end_output(self) -> None:
        """Send nothing more: the client sees the end, and the reader drops what the client still sends."""
        self._has_ended_output = True
        with suppress(OSError):  # the client has left
            self.socket.shutdown(trio.socket.SHUT_WR)
        self._note_idle()

    def _note_idle(self) -> None:
        self._is_idle = True
        self._idle_since = trio.current_time()
        if self._became_idle is not None:
            self._became_idle.set()

    async def _close_when_idle(self) -> None:
        """Close the connection once it is idle for too long, or the server stops. A child of the connection."""
        with self._keeping:
            while not self.is_closed:
                if self._host.closes_idle():
                    await self._close_after_last_request()
                else:
                    await self._close_after_idle_time()

    async def _close_after_idle_time(self) -> None:
        """Close the connection if it is idle for too long. Returns earlier if idle connections are to close."""
        timeout_s = self.config.keep_alive_timeout
        since = self._idle_since if self._is_idle else trio.current_time()
        await self._host.wait_until_idle_close(within_s=max(since + timeout_s - trio.current_time(), 0))
        if not self._host.closes_idle() and self._is_due(timeout_s):
            await self._wait_until_read()  # after a freeze: a request may be among the bytes
            if self._is_due(timeout_s):
                await self.close()

    def _is_due(self, timeout_s: float) -> bool:
        return self._is_idle and trio.current_time() >= self._idle_since + timeout_s

    async def _close_after_last_request(self) -> None:
        """Close the connection if it is idle and no request is on its way; else return once it is idle."""
        if not self._is_idle:
            self._became_idle = trio.Event()
            await self._became_idle.wait()
            return
        if self._has_ended_output:
            await trio.sleep_until(self._idle_since + STOP_LINGER_S)
            await self.close()
            return
        served = self._requests
        await trio.sleep(self._host.idle_grace_s)
        await self._wait_until_read()
        if not self._requests:
            await trio.sleep_until(self._opened_at + FIRST_REQUEST_S)
            await self._wait_until_read()
        if self._is_due(self._host.idle_grace_s) and self._requests == served and self._host.closes_idle():
            await self.close()

    async def _wait_until_read(self) -> None:
        """Wait until the reader has read what has arrived. Aborts a connection whose reader does not come to that."""
        for _ in range(UNREAD_POLLS_MAX):
            if not (self._is_idle and (self._input or self.has_unread())):
                return
            await trio.sleep(UNREAD_POLL_INTERVAL_S)  # the reader reads in a later round of the event loop
        self.abort()

    async def close(self) -> None:
        """Close the connection after all that was sent. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        if self.socket.fileno() < 0:
            return
        self._discard_unread()
        if self._is_plain:
            self.socket.close()
            return
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            await self.stream.aclose()
        self.socket.close()

    def _discard_unread(self) -> None:
        discarded = 0
        with suppress(OSError):  # nothing is unread any more, or the client has reset the connection
            while discarded < DISCARDED_BYTES_MAX and self.has_unread():
                discarded += len(os.read(self.socket.fileno(), RECEIVE_BYTES))

    def has_unread(self) -> bool:
        """Whether the client has sent bytes that are still unread."""
        unread = array("i", [0])
        with suppress(OSError, ValueError):  # the socket is closed
            fcntl.ioctl(self.socket.fileno(), termios.FIONREAD, unread)
        return unread[0] > 0


def is_full(sock: trio.socket.SocketType) -> bool:
    """Whether the kernel takes no more bytes for the client of a socket."""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLOUT)
    return not poll.poll(0)


def socket_of(stream: Stream) -> trio.socket.SocketType:
    """The socket below a connection's stream, with TLS or without."""
    return cast("trio.SocketStream", getattr(stream, "transport_stream", stream)).socket


def _keeps_alive(request: h11.Request, fields: Fields) -> bool:
    """Whether the connection can stay open after the response, as far as the request says so.

    It closes where another server on the way may see another end of this request or of its response: after a request
    with two framings, and after a method in small letters, which is another method than the one that is answered.

    Source: https://www.rfc-editor.org/rfc/rfc9112#section-6.1-15 and https://www.rfc-editor.org/rfc/rfc9110#section-9.1
    """
    if request.http_version < b"1.1" or not request.method.isupper():
        return False
    framings = 0
    for name, value in fields:
        if name in (b"content-length", b"transfer-encoding"):
            framings += 1
        elif name == b"connection" and any(token.strip() == b"close" for token in value.lower().split(b",")):
            return False
    return framings < 2


def _asks_for_another_protocol(request: h11.Request, fields: Fields) -> bool:
    """Whether hypercorn would answer this request with another protocol: a WebSocket, or HTTP/2 without TLS."""
    if request.method == b"PRI" and request.target == b"*" and request.http_version == b"2.0":
        return True
    upgrade, connection, has_body = b"", b"", False
    for name, value in fields:
        if name == b"upgrade":
            upgrade = value.strip().lower()
        elif name == b"connection":
            connection = value.lower()
        elif name in (b"content-length", b"transfer-encoding"):
            has_body = True
    if upgrade == b"h2c":
        return not has_body
    is_upgrade = any(token.strip() == b"upgrade" for token in connection.split(b","))
    return upgrade == b"websocket" and is_upgrade and request.method.upper() == b"GET"
