"""The transport for httpx: it sends a request over a kept or a new connection, and reads the response."""

import ssl
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import httpx  # noqa: ASYNC127  the project's choice
import trio

from service.models.http.body import BodyDecoder
from service.models.http.connect import connect
from service.models.http.connection import Connection
from service.models.http.head import HeadReader, ResponseHead
from service.models.http.idle import IdleConnections
from service.models.http.read_poller import ReadPoller

BODY = "lastcall.body"
"""The name of the response's :class:`ResponseBody` among its extensions."""
RESEND_S = 5.0
"""How soon a kept connection has to end for its request to be sent again: later the server may have worked on it."""


class Transport(httpx.AsyncBaseTransport):
    """Connections to one model server, each with one request at a time.

    There may be any number of connections at work; those without work are kept for a while, and so many.
    A connection is kept only after a whole request and a whole response without any ambiguity in it; in all other cases
    it is closed. Cancelling a request at any point closes its connection.

    Bodies of requests must be in memory. The only bound on time is the one on connecting: the caller sets all others.

    Args:
        url: An address of the server.
        ssl_context: For https: which certificates are trusted. The transport sets its ALPN, and forbids a second
            handshake within a connection (TLS 1.2 had them): sending would have to wait for bytes of the server.
        connect_timeout_s: See :func:`~service.models.http.connect.connect`.
        idle_max: Bound on the connections without work.
        idle_expiry_s: How long they are kept.
        poller: Waits for the bodies of all responses; None if each task waits by itself.
        when_connected: Called for each connection that was opened.

    Attributes:
        at_work: The connections with a request, each with its task and since when it has this request.
    """

    def __init__(
        self,
        url: httpx.URL,
        *,
        ssl_context: ssl.SSLContext | None,
        connect_timeout_s: float,
        idle_max: int,
        idle_expiry_s: float,
        poller: ReadPoller | None = None,
        when_connected: Callable[[], object] = bool,
    ) -> None:
        self._origin = _origin(url)
        self._ssl_context = ssl_context if url.scheme == "https" else None
        self._connect_timeout_s = connect_timeout_s
        self._idle = IdleConnections(connections_max=idle_max, expiry_s=idle_expiry_s)
        self._is_closed = False
        self.at_work: dict[Connection, tuple[trio.lowlevel.Task, float]] = {}
        self._poller = poller
        self._when_connected = when_connected
        if self._ssl_context is not None:
            self._ssl_context.set_alpn_protocols(["http/1.1"])
            self._ssl_context.options |= ssl.OP_NO_RENEGOTIATION

    def __repr__(self) -> str:
        return f"<Transport to {self._origin[1]}:{self._origin[2]}, {len(self._idle)} idle>"

    @property
    def address(self) -> str:
        """The server's scheme, host and port."""
        scheme, host, port = self._origin
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    @property
    def idle(self) -> Sequence[Connection]:
        """The connections without work."""
        return self._idle.connections

    def count_connections(self) -> tuple[int, int]:
        """How many connections are open: those with a request, and those without one."""
        return len(self.at_work), len(self._idle)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request, and return the response once its head is here.

        A kept connection that soon ends without a byte of an answer says nothing about the server, which may have
        closed it while the request was on its way: the request is sent again, over a new connection.

        Raises:
            httpx.TransportError: No response came.
        """
        if _origin(request.url) != self._origin:
            raise httpx.UnsupportedProtocol("this transport reaches one server only")
        connection = self._idle.take()
        if connection is not None:
            since = trio.current_time()
            try:
                return await self._exchange(request, connection)
            except _UnansweredError:
                if trio.current_time() > since + RESEND_S:
                    raise
        return await self._exchange(request, await self._connect())

    async def aclose(self) -> None:
        """Close all connections without work; others are closed by those who use them. Does not wait."""
        self._is_closed = True
        self._idle.close()

    async def _connect(self) -> Connection:
        _, host, port = self._origin
        connection = await connect(host, port, ssl_context=self._ssl_context, connect_timeout_s=self._connect_timeout_s)
        self._when_connected()
        return connection

    async def _exchange(self, request: httpx.Request, connection: Connection) -> httpx.Response:
        reader = HeadReader(request.method)
        self.at_work[connection] = trio.lowlevel.current_task(), trio.current_time()
        try:
            head = reader.encode_request(request.url.raw_path, request.headers.raw)
            sending = await _send(head + request.content, connection, reader)
            response = await _receive_head(connection, reader)
            body = ResponseBody(
                connection,
                response.open_body(),
                keeper=self if sending.is_whole and response.is_reusable else None,
                poller=self._poller,
                unsent=sending.rest,
                when_over=self._note_over,
            )
            body.begin(reader.take_rest())
            return httpx.Response(
                response.status,
                headers=response.headers,
                stream=body,
                extensions={"http_version": response.http_version, "reason_phrase": response.reason, BODY: body},
            )
        except BaseException:
            self._note_over(connection)
            connection.close()
            raise

    def _note_over(self, connection: Connection) -> None:
        self.at_work.pop(connection, None)

    def keep(self, connection: Connection) -> None:
        """Take a connection back whose response has ended as it should."""
        if self._is_closed:
            connection.close()
        else:
            self._idle.add(connection)


class ResponseBody(httpx.AsyncByteStream):
    """The body of a response. It must be read to its end, or closed.

    Args:
        keeper: Gets the connection back after the body; None if the connection cannot be used again.
        poller: Waits for :meth:`relay`.
        unsent: The rest of the request, if its response came before the whole request was sent.
        when_over: Called with the connection once the body is over, before the connection is given back or closed.
    """

    def __init__(
        self,
        connection: Connection,
        decoder: BodyDecoder,
        *,
        keeper: Transport | None,
        poller: ReadPoller | None = None,
        unsent: memoryview | None = None,
        when_over: Callable[[Connection], object] = bool,
    ) -> None:
        self._connection: Connection | None = connection
        self._decoder = decoder
        self._keeper = keeper
        self._poller = poller
        self._unsent = unsent
        self._when_over = when_over
        self._first = b""
        self._breakage: str | None = None  # why the connection broke

    def __repr__(self) -> str:
        return f"<ResponseBody: {'whole' if self._decoder.is_over else 'not whole'}, {self._connection!r}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if piece := await self.receive():
            return piece
        raise StopAsyncIteration

    def begin(self, data: bytes) -> None:
        """Take the bytes that came together with the head."""
        decoder = self._decoder
        if not decoder.is_over:
            self._first = decoder.feed(data)
        elif data:
            decoder.is_clean = False
        if decoder.is_over:
            self.close()

    async def receive(self) -> bytes:
        """The next bytes of the body, all that have arrived; empty at its end.

        Waits for the connection, and so lets other tasks run; only bytes that came together with the head, and the end,
        are returned at once. Cancelling loses nothing.

        Raises:
            httpx.ReadError: The connection broke; this and the next error come again with each further call.
            httpx.RemoteProtocolError: The body is not what the head announces, or ended too early.
            httpx.StreamClosed: The body was closed before its end.
        """
        if self._first:
            piece, self._first = self._first, b""
            return piece
        decoder = self._decoder
        while not decoder.is_over:
            if decoder.failure is not None:
                self.close()
                raise httpx.RemoteProtocolError(str(decoder.failure)) from decoder.failure
            if self._breakage is not None:
                raise httpx.ReadError(self._breakage)
            if self._connection is None:
                raise httpx.StreamClosed
            try:
                data = await self._receive_from(self._connection)
            except OSError as error:
                self._breakage = str(error)
                self.close()
                raise httpx.ReadError(self._breakage) from error
            piece = b""
            if data:
                piece = decoder.feed(data)
            else:
                decoder.end()
            if decoder.is_over:
                self.close()
            if piece:
                return piece
        return b""

    async def _receive_from(self, connection: Connection) -> bytes:
        """The next bytes of the connection, on which the rest of the request is sent meanwhile."""
        while self._unsent is not None:
            if (data := connection.receive_nowait()) is not None:
                await trio.lowlevel.checkpoint()
                return data
            self._send_rest(connection)
            if self._unsent is not None:
                await connection.wait_sendable(or_readable=True)
        return await connection.receive()

    def _send_rest(self, connection: Connection) -> None:
        assert self._unsent is not None
        try:
            self._unsent = _send_nowait(self._unsent, connection)
        except OSError:
            self._unsent = None  # the server takes no more, which the end of the response shows

    async def relay(self, take: Callable[[bytes], bool]) -> None:
        """Give the next bytes to ``take`` as they arrive, until it returns False or :meth:`receive` has to go on.

        Bytes that came together with the head, the end of the body and all errors are left to :meth:`receive`, which
        the caller calls next. Without a poller all is left to it. ``take`` is called in a step of another task.

        Raises:
            Exception: What ``take`` has raised.
        """
        connection, decoder = self._connection, self._decoder
        if self._poller is None or connection is None or connection.has_end or self._first or self._unsent is not None:
            return
        if decoder.is_over or decoder.failure is not None:
            return

        def take_next() -> bool:
            try:
                data = connection.receive_nowait()
            except OSError as error:
                self._breakage = str(error)
                return False
            if data is None:
                return True
            piece = b""
            if data:
                piece = decoder.feed(data)
            else:
                decoder.end()
            if decoder.is_over or decoder.failure is not None or not data:
                self._first = piece
                return False
            return (not piece or take(piece)) and not connection.has_end

        await self._poller.call_while_readable(connection.fileno(), take_next)
        if self._decoder.is_over or self._breakage is not None:
            self.close()

    def close(self) -> None:
        """Give the connection back if the body is whole, or else close it. Idempotent, and does not wait."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._when_over(connection)
        if self._keeper is not None and self._decoder.is_over and self._decoder.is_clean:
            self._keeper.keep(connection)
        else:
            connection.close()

    async def aclose(self) -> None:
        """As :meth:`close`, for httpx."""
        self.close()


class _Sending(NamedTuple):
    """How far a request was sent when its response begins: its rest, if that is still to be sent."""

    rest: memoryview | None
    is_whole: bool


class _UnansweredError(httpx.ReadError):
    """The connection ended without a byte of an answer."""


def _send_nowait(unsent: memoryview, connection: Connection) -> memoryview | None:
    """Send as much as the kernel takes now. Returns the rest; None once all is sent.

    Raises:
        OSError: The connection is broken.
    """
    while unsent and (sent := connection.send_nowait(unsent)):
        unsent = unsent[sent:]
    return None if not unsent and connection.flush_nowait() else unsent


async def _send(message: bytes, connection: Connection, reader: HeadReader) -> _Sending:
    """Send a request. Returns what is left of it once the server has answered.

    A server may answer before it has the whole request. So while the kernel takes no more bytes, the answer is listened
    to: a refusal ends the sending; after any other answer the rest is sent while the response is read, because the
    server may go on reading, or not.

    Raises:
        httpx.WriteError: This side cannot send, for want of memory for example.
        httpx.ReadError: The connection broke while the answer was listened to.
    """
    unsent: memoryview | None = memoryview(message)
    while unsent is not None:
        try:
            unsent = _send_nowait(unsent, connection)
            if unsent is not None:
                await connection.wait_sendable(or_readable=True)
        except ConnectionError:
            return _Sending(None, is_whole=False)  # there may be an answer nevertheless
        except OSError as error:
            raise httpx.WriteError(str(error)) from error
        if unsent is None:
            break
        try:
            answer = connection.receive_nowait()
        except OSError as error:
            raise _no_head(reader) from error
        if answer:
            reader.feed(answer)
        if answer == b"" or (reader.response is not None and reader.response.status >= 300):
            return _Sending(None, is_whole=False)
        if reader.response is not None:
            break
    return _Sending(unsent, is_whole=unsent is None)


async def _receive_head(connection: Connection, reader: HeadReader) -> ResponseHead:
    while reader.response is None:
        try:
            data = await connection.receive()
        except OSError as error:
            raise _no_head(reader) from error
        if not data:
            raise _no_head(reader)
        reader.feed(data)
    return reader.response


def _no_head(reader: HeadReader) -> httpx.ReadError:
    if reader.has_begun:
        return httpx.ReadError("the connection ended within the head of the answer")
    return _UnansweredError("the connection ended without an answer")


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    port = url.port or (443 if url.scheme == "https" else 80)
    return url.scheme, url.raw_host.decode("ascii"), port
