"""The open connections: ours on HTTP/1.1, and hypercorn's on HTTP/2 and for WebSockets, with what hypercorn lacks.

A connection begins on HTTP/1.1 (``http1_connection``) unless TLS has agreed on HTTP/2. A WebSocket's handshake, the
preface of HTTP/2 and an upgrade to HTTP/2 go to hypercorn's protocols, with all that has arrived. For those:

* A connection without a request is kept for a moment while the server closes: to close it while its first request
  arrives would reset it.
* A connection that its client has closed ends at once, not when the keep-alive time is over.
* An HTTP/2 connection sends the last frames of its streams before it closes. Without streams it is idle, and streams
  that the client has reset leave nothing behind. hypercorn waits for ever for a client that sends only a preface or
  resets its only stream, and keeps the buffer of each reset stream. It also waits for ever until the last bytes of a
  stream are sent to a client that has left: those bytes are dropped with the connection.
* A connection on which hypercorn itself refuses a WebSocket (without a key, or to a host that is not in its
  ``server_names``) closes with that answer, as the answer says. hypercorn keeps the connection open for ever.
* Bytes that hypercorn cannot parse end their connection. In hypercorn some bytes end the process, before any access
  check: an invalid ``HTTP2-Settings`` header, a path of HTTP/2 that is not ASCII, more priorities than the limit.
* No input holds the event loop: h2 works through all bytes of a call without a pause, so each call gets few bytes.
* A client that does not read cannot hold the server, nor an answer (``unread_answers``). hypercorn sends under a shield
  without a deadline, so neither its ``graceful_timeout`` nor any other cancellation reaches such a connection; only
  closing its socket does.
  Proven by ``tests/hosting/hypercorn/test_connections.py``.
"""

import fcntl
import os
import termios
import time
from array import array
from collections.abc import Iterable
from contextlib import suppress
from typing import cast

import h2.exceptions
import h11
import hpack
import structlog
import trio
from h2.errors import ErrorCodes
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol, H11WSConnection
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup
from hypercorn.utils import parse_socket_addr, repr_socket_addr

from service.freezes import extended_when_late
from service.hosting.hypercorn.asgi_receive import ConnectionTaskGroup
from service.hosting.hypercorn.http1_connection import (
    CHECKPOINT_BYTES,
    CLOSE_TIMEOUT_S,
    FIRST_REQUEST_S,
    HEAD_PIECE_BYTES,
    STEP_S,
    UNREAD_POLL_INTERVAL_S,
    Http1Connection,
    ServerFields,
    Stream,
    is_full,
    socket_of,
)
from service.hosting.hypercorn.http1_exchange import Address
from service.steps import Steps
from service.stop_state import Phase, StopState
from service.telemetry.tree_nodes import Node, Notes

logger = structlog.get_logger("lastcall.connections")

QUIET_POLLS = 3
"""Looks in a row without unread bytes: a request stops the idle timer two event loop rounds after it was read."""
HEAD_BYTES_MAX = 16 * 1024
"""Bound on a request's head on HTTP/2, compressed and as a list of fields; as ``h11_max_incomplete_size`` on HTTP/1.

Source: https://www.rfc-editor.org/rfc/rfc9113#name-defined-settings (``SETTINGS_MAX_HEADER_LIST_SIZE``)
"""
FRAMES_PIECE_BYTES = 512
"""A frame of HTTP/2 can have only 9 bytes, and takes some 20 microseconds, or 200 if it begins a request."""
SIZE_UPDATES_MAX = 2
"""Source: https://www.rfc-editor.org/rfc/rfc7541#section-4.2"""
_SIZE_UPDATES = bytes(range(0x20, 0x40))
LAST_FRAMES_S = 0.5
"""How long a close waits for HTTP/2 frames that the client's window holds back."""


class Connections:
    """All connections of a worker, once :meth:`open` is installed in place of hypercorn's ``TCPServer`` (``patches``).

    Args:
        stop: Says when the listeners close: a connection on HTTP/1 then closes after its current response.

    Attributes:
        idle_grace_s: How long an idle connection waits for a last request once hypercorn stops.
        closes_idle: Whether idle connections close already, before hypercorn stops.
    """

    def __init__(self, stop: StopState) -> None:
        self.stop = stop
        self.idle_grace_s = 0.0
        self.closes_idle = False
        self._open: set[Connection] = set()
        self._idle: set[trio.CancelScope] = set()
        self._none_left = trio.lowlevel.ParkingLot()
        self._fields: ServerFields | None = None

    def fields(self, config: Config) -> ServerFields:
        """The fields that hypercorn adds to responses on HTTP/1.1."""
        if self._fields is None or self._fields.config is not config:
            self._fields = ServerFields(config)
        return self._fields

    def open(
        self, app: AppWrapper, config: Config, context: WorkerContext, state: ConnectionState, stream: Stream
    ) -> "Connection":
        """Make a connection. Installed in place of hypercorn's ``TCPServer``."""
        return Connection(app, config, context, state, stream, connections=self)

    def note_begun(self, connection: "Connection") -> None:
        self._open.add(connection)

    def note_closed(self, connection: "Connection") -> None:
        self._open.discard(connection)
        if not self._open:
            self._none_left.unpark_all()

    @property
    def any_open(self) -> bool:
        return bool(self._open)

    @property
    def all_stalled(self) -> bool:
        """Whether no client reads any more."""
        return all(it.is_stalled for it in self._open)

    async def wait_none_open(self) -> None:
        while self._open:
            await self._none_left.park()

    def close_idle(self, *, grace_s: float) -> None:
        """Close each connection that is idle, or will be, after a moment in which a last request may come."""
        self.idle_grace_s = grace_s
        self.closes_idle = True
        for scope in self._idle:
            scope.cancel()

    def keep_idle(self) -> None:
        """Close idle connections no longer: the opposite of :meth:`close_idle`."""
        self.idle_grace_s = 0.0
        self.closes_idle = False

    def until_idle_close(self, scope: trio.CancelScope) -> "_UntilIdleClose":
        """Cancel a scope, around a connection's idle time, once idle connections close."""
        return _UntilIdleClose(self, scope)

    def note_idle(self, scope: trio.CancelScope) -> None:
        if self.closes_idle:
            scope.cancel()
        self._idle.add(scope)

    def note_not_idle(self, scope: trio.CancelScope) -> None:
        self._idle.discard(scope)

    def abort_stalled(self) -> int:
        """Close the connections whose clients do not read; returns their number. Slow connections stay open."""
        return self._abort([it for it in self._open if it.is_stalled])

    def abort_all(self) -> int:
        """Close every connection, in any state; returns their number."""
        return self._abort(list(self._open))

    def abort_handshakes(self, *, older_than_s: float = 0) -> int:
        """Close the connections that are so old and whose TLS handshake is not complete; returns their number."""
        opened_until = trio.current_time() - older_than_s
        return self._abort([it for it in self._open if it.is_in_handshake and it.opened_at <= opened_until])

    def describe(self, notes: Notes) -> Steps[None]:
        """Tell the live tree which tasks serve connections."""
        for connection in tuple(self._open):
            notes.name(
                connection.reader,
                Node(
                    parent=None,
                    kind="connection",
                    name=f"client {connection.client}",
                    state=connection.state_shown,
                    since=notes.moment(connection.opened_at),
                ),
            )
            yield

    def _abort(self, connections: "list[Connection]") -> int:
        for connection in connections:
            connection.abort()
        return len(connections)


class _UntilIdleClose:
    """See :meth:`Connections.until_idle_close`. A class, because each connection waits in it."""

    __slots__ = ("_connections", "_scope")

    def __init__(self, connections: Connections, scope: trio.CancelScope) -> None:
        self._connections = connections
        self._scope = scope

    def __enter__(self) -> None:
        self._connections.note_idle(self._scope)

    def __exit__(self, *_: object) -> None:
        self._connections.note_not_idle(self._scope)


class Connection(TCPServer):
    """One connection, as hypercorn serves it."""

    _task_group: ConnectionTaskGroup

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        state: ConnectionState,
        stream: Stream,
        *,
        connections: Connections,
    ) -> None:
        config.h2_max_header_list_size = HEAD_BYTES_MAX
        # The locks and tasks of hypercorn's connection take memory, and HTTP/1.1 needs none of them.
        self.app, self.config, self.state, self.stream = app, config, state, stream
        self._worker_context = context
        self._connections = connections
        self._socket = socket_of(stream)
        self._takes_plain_bytes = isinstance(stream, trio.SocketStream)
        self.opened_at = trio.current_time()
        self._handshake: trio.CancelScope | None = None if self._takes_plain_bytes else trio.CancelScope()
        self._http1: Http1Connection | None = None
        self.reader: trio.lowlevel.Task | None = None
        self.client = ""

    def __repr__(self) -> str:
        state = "closed" if self._socket.fileno() < 0 else "in handshake" if self.is_in_handshake else "open"
        return f"<Connection {self._socket.fileno()}: {state}>"

    @property
    def socket(self) -> trio.socket.SocketType:
        return self._socket

    @property
    def state_shown(self) -> str:
        """What the live tree calls its state."""
        if self.is_in_handshake:
            return "handshake"
        return "idle" if self._http1 is not None and self._http1.is_idle else "busy"

    @property
    def is_in_handshake(self) -> bool:
        return self._handshake is not None

    @property
    def is_http2(self) -> bool:
        return self._http2 is not None

    @property
    def _http2(self) -> H2Protocol | None:
        protocol = getattr(getattr(self, "protocol", None), "protocol", None)
        return protocol if isinstance(protocol, H2Protocol) else None

    @property
    def idle_grace_s(self) -> float:
        return self._connections.idle_grace_s

    def closes_idle(self) -> bool:
        return self._connections.closes_idle or self._worker_context.terminated.is_set()

    async def wait_until_idle_close(self, *, within_s: float) -> None:
        with trio.move_on_after(within_s) as scope, self._connections.until_idle_close(scope):
            await self._worker_context.terminated.wait()

    @property
    def closes_after_response(self) -> bool:
        """Whether the connection, on HTTP/1, closes after its current response instead of waiting for a request.

        With a grace it closes only after a response that says so: its client may be about to send the next request.
        """
        if self._connections.idle_grace_s:
            return False
        closing = self._connections.stop.phase >= Phase.CLOSING or self._worker_context.terminated.is_set()
        return closing and not self.is_http2

    async def run(self) -> None:
        self._connections.note_begun(self)
        self.reader = trio.lowlevel.current_task()
        try:
            alpn: str | None = "http/1.1"
            if self._handshake is not None:
                with self._handshake:
                    alpn = await self._shake_hands()
            if self._handshake is not None:
                return
            sock = self._socket
            client = parse_socket_addr(sock.family, sock.getpeername())
            server = parse_socket_addr(sock.family, sock.getsockname())
            self.client = repr_socket_addr(sock.family, sock.getpeername())
            begun: bytes | None = b""
            if alpn != "h2":
                begun = await self._serve_http1(client, server)
            if begun is not None:
                await self._serve_other_protocol(begun, client, server, alpn=alpn)
        except* OSError:
            pass
        except* Exception as errors:  # noqa: BLE001  the edge of a connection
            logger.info("a connection was dropped: what it sent breaks the server's parser", error=repr(errors))
        finally:
            self._socket.close()
            self._connections.note_closed(self)

    async def _shake_hands(self) -> str | None:
        """Agree on keys. Returns the protocol that was agreed on."""
        try:
            with trio.fail_after(self.config.ssl_handshake_timeout):
                await self.stream.do_handshake()
        except (trio.BrokenResourceError, trio.TooSlowError):
            return None
        self._handshake = None
        agreed: str | None = self.stream.selected_alpn_protocol()
        return agreed

    async def _serve_http1(self, client: Address, server: Address) -> bytes | None:
        """Serve HTTP/1.1. Returns the bytes with which another protocol begins, or None once the connection ended."""
        self._http1 = Http1Connection(
            self.app,
            self._worker_context,
            ConnectionState(self.state),
            self.stream,
            host=self,
            fields=self._connections.fields(self.config),
            client=client,
            server=server,
        )
        try:
            return await self._http1.run()
        finally:
            self._http1 = None  # a circle

    async def _serve_other_protocol(self, begun: bytes, client: Address, server: Address, *, alpn: str | None) -> None:
        """Serve HTTP/2, or WebSockets, as hypercorn does."""
        context = ConnectionContext(self._worker_context, self)
        super().__init__(self.app, self.config, context, self.state, self.stream)
        try:
            task_group = self._task_group = ConnectionTaskGroup()
            async with task_group:
                self.protocol = ProtocolWrapper(
                    self.app,
                    self.config,
                    self.context,
                    cast("TaskGroup", task_group),
                    ConnectionState(self.state),
                    not self._takes_plain_bytes,
                    client,
                    server,
                    self.protocol_send,
                    alpn,
                )
                await self.protocol.initiate()
                await self.idle_task.restart(cast("TaskGroup", self._task_group), self._idle_timeout)
                await self._read_data(begun)
        finally:
            await self._close()  # noqa: ASYNC102  a cancelled close closes the socket

    @property
    def is_stalled(self) -> bool:
        """Whether the client does not read: the kernel's buffer is full, or HTTP/2 frames wait for a window."""
        if self._socket.fileno() < 0:
            return True
        if self._http2 is not None and self._http2.stream_buffers:
            return True
        return is_full(self._socket)

    @property
    def is_stalled_as_a_whole(self) -> bool:
        """Whether no stream can go on at this moment: the kernel's buffer is full, or HTTP/2's window is empty."""
        if self._socket.fileno() < 0 or is_full(self._socket):
            return True
        return self._http2 is not None and self._http2.connection.outbound_flow_control_window <= 0

    def abort(self) -> None:
        """Close the connection without GOAWAY or a TLS close. The kernel still delivers the bytes that it has taken."""
        if self._handshake is not None:
            self._handshake.cancel()
        elif self._http1 is not None:
            self._http1.abort()
        elif not hasattr(self, "_task_group"):
            self._socket.close()
        else:
            self._task_group.cancel()
            self._socket.close()

    def reset_stream(self, stream_id: int) -> None:
        """End a stream of HTTP/2 and its request; the client is told."""
        self._task_group.spawn(self._reset_stream, stream_id)

    async def _reset_stream(self, stream_id: int) -> None:
        protocol = self.protocol.protocol
        assert isinstance(protocol, H2Protocol)
        with suppress(h2.exceptions.ProtocolError):  # the client was faster
            protocol.connection.reset_stream(stream_id, ErrorCodes.CANCEL)
        await protocol._close_stream(stream_id)
        if stream_id in protocol.stream_buffers:
            await self._drop_buffer(protocol, stream_id)
        await protocol._flush()
        await self._tidy_up(protocol)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            await self.write(event.data)
            if self._has_refused:
                self._task_group.cancel()
            return
        await super().protocol_send(event)

    @property
    def _has_refused(self) -> bool:
        """Whether hypercorn itself has answered a WebSocket's handshake: only hypercorn answers in the task that reads.

        Its ``WSStream`` sends no ``StreamClosed`` after ``_send_error_response``.
        """
        protocol = self.protocol.protocol
        if not isinstance(protocol, H11Protocol) or trio.lowlevel.current_task() is not self.reader:
            return False
        connection = protocol.connection
        if isinstance(connection, H11WSConnection):
            connection = connection.h11_connection
        return connection.our_state is h11.MUST_CLOSE

    async def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        # Nearly always the kernel takes all bytes at once. Then hypercorn's lock and shield and Trio's checks protect
        # nothing, and cost five times as much as the system call.
        sent = self.write_now(data)
        if sent < len(data):
            await super().protocol_send(RawData(data=data[sent:]))  # handles a socket that is broken or closed, too
        elif sent > CHECKPOINT_BYTES:
            await trio.lowlevel.cancel_shielded_checkpoint()  # a long replay lets other tasks run

    def write_now(self, data: bytes) -> int:
        """Send as many bytes as the kernel takes now; returns their number. 0 under TLS and while others are sent."""
        if not self._takes_plain_bytes or self.send_lock.locked():
            return 0
        try:
            return os.write(self._socket.fileno(), data)
        except OSError:  # the socket would block, or is broken or closed
            return 0

    async def _read_data(self, begun: bytes = b"") -> None:
        """Read as hypercorn does, but without a cancel scope for a read that has no deadline.

        Args:
            begun: What was received already.
        """
        data: bytes | bytearray = begun
        try:
            data = data or await self._receive()
            while data:
                await self._handle_in_pieces(data)
                if self._http2 is not None:
                    await self._tidy_up(self._http2)
                data = await self._receive()
        except (trio.ClosedResourceError, trio.BrokenResourceError, trio.TooSlowError):
            pass
        await self.protocol.handle(Closed())
        if self._http2 is not None:
            for buffer in self._http2.stream_buffers.values():
                await buffer.close()
        if self.idle_task._handle is not None:
            await self.idle_task.stop()  # the client has closed: no request can follow

    async def _handle_in_pieces(self, data: bytes | bytearray) -> None:
        began_at = time.perf_counter()
        done = 0
        while True:
            piece = bytes(data[done : done + self._piece_bytes])
            await self.protocol.handle(RawData(data=piece))
            done += len(piece)
            if done == len(data) or self._socket.fileno() < 0:
                return
            if time.perf_counter() - began_at > STEP_S:
                await trio.lowlevel.checkpoint()
                began_at = time.perf_counter()

    @property
    def _piece_bytes(self) -> int:
        """How many bytes of the input the parser gets next."""
        protocol = self.protocol.protocol
        if isinstance(protocol, H2Protocol):
            return FRAMES_PIECE_BYTES
        return HEAD_PIECE_BYTES

    async def _tidy_up(self, protocol: H2Protocol) -> None:
        """Drop the streams that the client has reset, and start the idle timer if no stream is left."""
        for stream_id, buffer in list(protocol.stream_buffers.items()):
            if stream_id not in protocol.streams and not buffer._complete:
                await self._drop_buffer(protocol, stream_id)
        if not protocol.streams and self.idle_task._handle is None:
            await self.idle_task.restart(cast("TaskGroup", self._task_group), self._idle_timeout)

    async def _drop_buffer(self, protocol: H2Protocol, stream_id: int) -> None:
        """Drop what is left of a stream. hypercorn's sending task then removes the stream."""
        await protocol.stream_buffers[stream_id].close()
        protocol.priority.unblock(stream_id)
        await protocol.has_data.set()

    async def _receive(self) -> bytes | bytearray:
        if not self.config.read_timeout:
            return await self.stream.receive_some(MAX_RECV)
        timeout_s = float(self.config.read_timeout)
        with trio.fail_after(timeout_s) as scope, extended_when_late(scope, timeout_s=timeout_s):
            return await self.stream.receive_some(MAX_RECV)

    async def _idle_timeout(self) -> None:
        await self.wait_until_idle_close(within_s=self.config.keep_alive_timeout)
        # The reader stops this task when it reads a request; each await before the shield lets the reader do so.
        await trio.lowlevel.checkpoint()
        if self.closes_idle():
            await self._wait_for_request_on_its_way()
        else:
            await self._wait_until_quiet()  # after a freeze the time is over, but requests may have arrived in it
        if isinstance(self.protocol.protocol, H2Protocol):
            await self._send_goaway(self.protocol.protocol)
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True) as closing:
            await self._initiate_server_close()
        if closing.cancelled_caught:
            self.abort()

    async def _wait_for_request_on_its_way(self) -> None:
        """Return when no request is on its way. The reader cancels this wait when it reads a request."""
        if grace_s := self._connections.idle_grace_s:
            await trio.sleep(grace_s)
        await self._wait_until_read()
        if not self.protocol.protocol.keep_alive_requests:
            await trio.sleep_until(self.opened_at + FIRST_REQUEST_S)
            await self._wait_until_read()

    async def _wait_until_quiet(self) -> None:
        """Return when all bytes are read and hold no request. The reader cancels this wait when it reads a request."""
        quiet = 0
        while quiet < QUIET_POLLS:
            await trio.sleep(UNREAD_POLL_INTERVAL_S)
            quiet = 0 if self._has_unread() else quiet + 1

    async def _wait_until_read(self) -> None:
        while self._has_unread():  # noqa: ASYNC110  the reader reads in a later round of the event loop
            await trio.sleep(UNREAD_POLL_INTERVAL_S)

    async def _send_goaway(self, protocol: H2Protocol) -> None:
        with trio.move_on_after(LAST_FRAMES_S):
            while protocol.stream_buffers:  # noqa: ASYNC110  hypercorn's sending task has no event for this
                await trio.sleep(0.001)
        with suppress(h2.exceptions.ProtocolError):
            protocol.connection.close_connection()
        await protocol._flush()

    async def _close(self) -> None:
        # hypercorn calls this several times. Its `send_eof` takes a system call and a checkpoint, which are of use only
        # if the client has sent bytes that are still unread.
        if self._socket.fileno() < 0:
            return
        if self._has_unread():
            await super()._close()
        elif self._takes_plain_bytes:
            self._socket.close()  # as the stream's own close, without a round of the event loop
        else:
            await self.stream.aclose()

    def _has_unread(self) -> bool:
        """Whether the client has sent bytes that are still unread: to close now would reset the connection."""
        unread = array("i", [0])
        with suppress(OSError):  # the socket is closed
            fcntl.ioctl(self._socket.fileno(), termios.FIONREAD, unread)
        return unread[0] > 0


class BoundedDecoder(hpack.Decoder):
    """h2's decoder of heads, with a bound on its input: hpack bounds only the decoded list.

    Proven by ``tests/hosting/hypercorn/test_event_loop.py``.
    """

    def decode(self, data: bytes, raw: bool = False) -> Iterable[hpack.HeaderTuple]:
        if len(data) > HEAD_BYTES_MAX:
            raise hpack.OversizedHeaderListError(f"A head may have {HEAD_BYTES_MAX} bytes.")
        if len(data) - len(data.lstrip(_SIZE_UPDATES)) > SIZE_UPDATES_MAX:
            raise hpack.HPACKDecodingError("A head has more table size updates than it may have.")
        return super().decode(data, raw)


class ConnectionContext(WorkerContext):
    """The worker's context, as one connection sees it.

    With ``terminated`` set, hypercorn's HTTP/2 sends GOAWAY before its sending task has sent the last frames of a
    stream, which truncates the stream, and it resets new requests. So HTTP/2 never sees ``terminated`` set, and
    :meth:`Connection._send_goaway` sends both in the right order.
    Proven by ``tests/hosting/hypercorn/test_connections.py``.
    """

    def __init__(self, worker_context: WorkerContext, connection: Connection) -> None:
        self._worker_context = worker_context
        self._connection = connection
        self.max_requests = worker_context.max_requests
        self.terminate = worker_context.terminate
        self.terminated = cast("EventWrapper", self)

    async def mark_request(self) -> None:
        await self._worker_context.mark_request()

    def is_set(self) -> bool:
        """Stand in for ``terminated.is_set``."""
        return self._connection.closes_after_response

    async def wait(self) -> None:
        """Stand in for ``terminated.wait``."""
        await self._worker_context.terminated.wait()
