"""The open connections: hypercorn's own, counted, with the patience and the force that it lacks.

* A connection on which nothing was asked yet is not closed in the moment when its request arrives: that would reset it.
* A connection that its client has closed is gone at once, not when the keep-alive time is over.
* An HTTP/2 connection sends the last frames of its streams before it closes. Without a stream it is idle, and nothing
  is left of those that its client has reset: hypercorn waits for ever for a client that sends a preface and no more, or
  gives up its only stream, and keeps the buffer of each stream that was given up.
* A connection that closes with its response is gone, also where its client has asked again meanwhile: hypercorn pauses
  its reader for that and, once it stops, leaves it so for ever.
* A connection on which hypercorn itself refuses a request (a websocket's without a key, one to a host that is none of
  its ``server_names``) closes with that answer, as the answer says. hypercorn keeps it open for ever.
* What hypercorn cannot parse ends its connection. hypercorn has some bytes end the process, before any access check:
  an ``HTTP2-Settings`` header that is none, a path of HTTP/2 that is not ASCII, more priorities than the limit.
* A client that has closed its sending side after its request is answered, unless the request waits for a turn or
  streams one. hypercorn takes every end of input for leaving.
* Empty lines before a request are skipped. h11 refuses them.
* Nothing that has come holds the event loop: h11 and h2 work through all that they are given in one go, whatever it is,
  so they are given little at a time, and a head of either protocol is bounded.
* A client that does not read cannot hold the server. hypercorn sends under a shield without a deadline, so neither its
  ``graceful_timeout`` nor any other cancellation reaches such a connection; only closing its socket does.
  Proven by ``tests/hosting/hypercorn/test_connections.py``.
"""

import fcntl
import os
import select
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
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup

from service.freezes import forgiving
from service.hosting.hypercorn.asgi_receive import ConnectionTaskGroup
from service.hosting.hypercorn.request_parser import RequestParser

logger = structlog.get_logger("lastcall.connections")

Stream = trio.SSLStream[trio.SocketStream]
"""As hypercorn types it, with TLS or without."""
FIRST_REQUEST_S = 0.05
"""How long a connection without a request is kept once the listeners close: a request may be on its way."""
UNREAD_LOOK_S = 0.005
QUIET_LOOKS = 3
"""A request stops the idle timer two rounds of the event loop after it was read."""
CHECKPOINT_BYTES = 4096
HEAD_BYTES_MAX = 16 * 1024
"""Of a request's head on HTTP/2, as on HTTP/1 (``h11_max_incomplete_size``): compressed, and as a list of fields.

Source: https://www.rfc-editor.org/rfc/rfc9113#name-defined-settings (``SETTINGS_MAX_HEADER_LIST_SIZE``)
"""
HEAD_PIECE_BYTES = 4096
BODY_PIECE_BYTES = 16 * 1024
FRAMES_PIECE_BYTES = 512
"""The frames of HTTP/2 may be of 9 bytes, and each takes some 20 microseconds, or 200 where it begins a request."""
SIZE_UPDATES_MAX = 2
"""Source: https://www.rfc-editor.org/rfc/rfc7541#section-4.2"""
_SIZE_UPDATES = bytes(range(0x20, 0x40))
STEP_S = 0.002
"""How long a connection goes on with what has come before others have their turn."""
LAST_FRAMES_S = 0.5
"""How long HTTP/2 frames may take that wait for the client's window."""


class Connections:
    """All connections of a worker, once :meth:`open` is installed in place of hypercorn's ``TCPServer`` (``patches``).

    Attributes:
        closing: Set once no more clients are taken: a connection on HTTP/1 closes with the response that it is at.
    """

    def __init__(self) -> None:
        self.closing = False
        self._open: set[Connection] = set()

    def open(
        self, app: AppWrapper, config: Config, context: WorkerContext, state: ConnectionState, stream: Stream
    ) -> "Connection":
        """In place of hypercorn's ``TCPServer``."""
        return Connection(app, config, context, state, stream, connections=self, all_open=self._open)

    def abort_stalled(self) -> int:
        """Close the connections whose clients do not take what they get; how many there were. Others are only slow."""
        return self._abort([it for it in self._open if it.is_stalled])

    def abort_all(self) -> int:
        """Close every connection, whatever it is doing; how many there were."""
        return self._abort(list(self._open))

    def abort_handshakes(self) -> int:
        """Close the connections that have not got so far as to carry a request; how many there were."""
        return self._abort([it for it in self._open if it.is_in_handshake])

    def _abort(self, connections: "list[Connection]") -> int:
        for connection in connections:
            connection.abort()
        return len(connections)


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
        all_open: "set[Connection]",
    ) -> None:
        config.h2_max_header_list_size = HEAD_BYTES_MAX
        super().__init__(app, config, ConnectionContext(context, self), state, stream)
        self._worker_context = context
        self._connections = connections
        self._socket = socket_of(stream)
        self._takes_plain_bytes = isinstance(stream, trio.SocketStream)
        self._all_open = all_open
        self._opened_at = trio.current_time()
        self._handshake = trio.CancelScope()

    def __repr__(self) -> str:
        state = "closed" if self._socket.fileno() < 0 else "in handshake" if self.is_in_handshake else "open"
        return f"<Connection {self._socket.fileno()}: {state}>"

    @property
    def is_in_handshake(self) -> bool:
        return not hasattr(self, "protocol")

    @property
    def is_http2(self) -> bool:
        return isinstance(self.protocol.protocol, H2Protocol)

    @property
    def closes_after_response(self) -> bool:
        """Whether it is to close with the response on HTTP/1 that it is at, and not to wait for another request."""
        closing = self._connections.closing or self._worker_context.terminated.is_set()
        return closing and not self.is_http2

    async def run(self) -> None:
        self._all_open.add(self)
        self._reader = trio.lowlevel.current_task()
        try:
            if self._takes_plain_bytes:
                await super().run()
            else:
                with self._handshake:
                    await super().run()
        except* Exception as errors:  # noqa: BLE001  the edge of a connection
            logger.info("a connection was dropped: what it sent breaks the server's parser", error=repr(errors))
        finally:
            self._all_open.discard(self)

    @property
    def is_stalled(self) -> bool:
        """Whether its client has not read for a while, or gives no window on HTTP/2."""
        if self._socket.fileno() < 0:
            return True
        protocol = None if self.is_in_handshake else self.protocol.protocol
        if isinstance(protocol, H2Protocol) and protocol.stream_buffers:
            return True
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLOUT)
        return not poll.poll(0)  # the kernel takes no more for it

    def abort(self) -> None:
        """End it without another word. What the kernel has already taken is still delivered."""
        if self.is_in_handshake:
            self._handshake.cancel()
        else:
            self._task_group.cancel()
            self._socket.close()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            await self.write(event.data)
            if self._has_refused:
                self._task_group.cancel()
            return
        await super().protocol_send(event)
        if isinstance(event, Closed) and self._is_ahead:
            self._task_group.cancel()

    @property
    def _has_refused(self) -> bool:
        """Whether hypercorn has answered by itself, on HTTP/1: in the task that reads, where no application does.

        Neither its ``WSStream`` nor its ``HTTPStream`` send a ``StreamClosed`` after ``_send_error_response``.
        """
        protocol = self.protocol.protocol
        if not isinstance(protocol, H11Protocol) or trio.lowlevel.current_task() is not self._reader:
            return False
        connection = protocol.connection
        if isinstance(connection, H11WSConnection):
            connection = connection.h11_connection
        return connection.our_state is h11.MUST_CLOSE

    @property
    def _is_ahead(self) -> bool:
        """Whether its client, on HTTP/1, has sent more than the request that is answered: nobody reads that now."""
        protocol = self.protocol.protocol
        return isinstance(protocol, H11Protocol) and bool(protocol.connection.trailing_data[0])

    async def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        if self._takes_plain_bytes and not self.send_lock.locked():
            # Nearly always the kernel takes all of it at once, and then hypercorn's lock and shield and Trio's own
            # precautions guard nothing, at five times the price of the system call.
            try:
                sent = os.write(self._socket.fileno(), data)
            except OSError:  # it would block, or is broken or closed: Trio finds out in its own way
                sent = 0
            if sent == len(data):
                if sent > CHECKPOINT_BYTES:
                    await trio.lowlevel.cancel_shielded_checkpoint()  # a long replay is not to have the loop for itself
                return
            data = data[sent:]
        await super().protocol_send(RawData(data=data))

    async def _read_data(self) -> None:
        """As hypercorn reads, without a cancel scope for each read where there is no deadline."""
        self._use_request_parser()
        data: bytes | bytearray = b"..."
        while data:
            try:
                data = await self._receive()
            except (trio.ClosedResourceError, trio.BrokenResourceError, trio.TooSlowError):
                break
            await self._handle_in_pieces(data)
            if isinstance(self.protocol.protocol, H2Protocol):
                await self._tidy_up(self.protocol.protocol)
        else:
            await self._let_answer()
        await self.protocol.handle(Closed())
        if self.idle_task._handle is not None:
            await self.idle_task.stop()  # the client has closed: nothing is left to wait for

    def _use_request_parser(self) -> None:
        protocol = self.protocol.protocol
        if isinstance(protocol, H11Protocol):
            protocol.connection = RequestParser(head_bytes_max=self.config.h11_max_incomplete_size)

    async def _let_answer(self) -> None:
        """The input has ended: return once the request that is being answered has been, or has to take it for leaving.

        What waits for no turn is bounded by deadlines of its own.
        """
        protocol = self.protocol.protocol
        if isinstance(protocol, H11Protocol) and isinstance(protocol.stream, HTTPStream) and self._task_group.newest:
            await self._task_group.newest.wait_over()

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
        """How much of what has come its parser is to be given next."""
        protocol = self.protocol.protocol
        if isinstance(protocol, H2Protocol):
            return FRAMES_PIECE_BYTES
        return BODY_PIECE_BYTES if protocol.connection.their_state is h11.SEND_BODY else HEAD_PIECE_BYTES

    async def _tidy_up(self, protocol: H2Protocol) -> None:
        """Let go of streams that the client has reset, and be idle without a stream."""
        for stream_id, buffer in list(protocol.stream_buffers.items()):
            if stream_id not in protocol.streams and not buffer._complete:
                await buffer.close()
                protocol.priority.unblock(stream_id)
                await protocol.has_data.set()
        if not protocol.streams and self.idle_task._handle is None:
            await self.idle_task.restart(cast("TaskGroup", self._task_group), self._idle_timeout)

    async def _receive(self) -> bytes | bytearray:
        if not self.config.read_timeout:
            return await self.stream.receive_some(MAX_RECV)
        timeout_s = float(self.config.read_timeout)
        with trio.fail_after(timeout_s) as scope, forgiving(scope, timeout_s=timeout_s):
            return await self.stream.receive_some(MAX_RECV)

    async def _idle_timeout(self) -> None:
        with trio.move_on_after(self.config.keep_alive_timeout):
            await self._worker_context.terminated.wait()
        # Whoever reads a request stops this task, so everything before the shield gives it the chance to.
        await trio.lowlevel.checkpoint()
        if self._worker_context.terminated.is_set():
            await self._wait_for_request_on_its_way()
        else:
            await (
                self._wait_until_quiet()
            )  # a process that was frozen finds the time over, and requests that came in it
        if isinstance(self.protocol.protocol, H2Protocol):
            await self._say_goodbye(self.protocol.protocol)
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()

    async def _wait_for_request_on_its_way(self) -> None:
        """Return when there is none. Whoever reads one cancels this."""
        await self._wait_until_read()
        if not self.protocol.protocol.keep_alive_requests:
            await trio.sleep_until(self._opened_at + FIRST_REQUEST_S)
            await self._wait_until_read()

    async def _wait_until_quiet(self) -> None:
        """Return when nothing is left to read and what was read is no request. One that is cancels this."""
        quiet = 0
        while quiet < QUIET_LOOKS:
            await trio.sleep(UNREAD_LOOK_S)
            quiet = 0 if self._has_unread() else quiet + 1

    async def _wait_until_read(self) -> None:
        while self._has_unread():  # noqa: ASYNC110  the reader's turn in the event loop comes
            await trio.sleep(UNREAD_LOOK_S)

    async def _say_goodbye(self, protocol: H2Protocol) -> None:
        with trio.move_on_after(LAST_FRAMES_S):
            while protocol.stream_buffers:  # noqa: ASYNC110  the task that sends them tells nobody
                await trio.sleep(0.001)
        with suppress(h2.exceptions.ProtocolError):
            protocol.connection.close_connection()
        await protocol._flush()

    async def _close(self) -> None:
        # hypercorn calls it again and again, and says goodbye with a system call and a checkpoint that only matter
        # where the client has sent what nobody has read.
        if self._socket.fileno() < 0:
            return
        if self._has_unread():
            await super()._close()
        elif self._takes_plain_bytes:
            self._socket.close()  # as the stream's own close, less a round of the event loop
        else:
            await self.stream.aclose()

    def _has_unread(self) -> bool:
        """Whether the client has sent what nobody has looked at: to close now would reset it."""
        unread = array("i", [0])
        with suppress(OSError):  # it is closed
            fcntl.ioctl(self._socket.fileno(), termios.FIONREAD, unread)
        return unread[0] > 0


class BoundedDecoder(hpack.Decoder):
    """h2's decoder of heads, with a bound on what it is to work through: hpack has one on the outcome alone.

    Proven by ``tests/hosting/hypercorn/test_event_loop.py``.
    """

    def decode(self, data: bytes, raw: bool = False) -> Iterable[hpack.HeaderTuple]:
        if len(data) > HEAD_BYTES_MAX:
            raise hpack.OversizedHeaderListError(f"A head may have {HEAD_BYTES_MAX} bytes.")
        if len(data) - len(data.lstrip(_SIZE_UPDATES)) > SIZE_UPDATES_MAX:
            raise hpack.HPACKDecodingError("A head has more table size updates than it may have.")
        return super().decode(data, raw)


def socket_of(stream: Stream) -> trio.socket.SocketType:
    """The socket below a connection's stream, with TLS or without."""
    return cast("trio.SocketStream", getattr(stream, "transport_stream", stream)).socket


class ConnectionContext(WorkerContext):
    """What a connection sees of the worker's context.

    With ``terminated`` set, hypercorn's HTTP/2 says goodbye while the task that sends its frames has not sent the last
    of a stream yet, which truncates it, and resets new requests. So it is not told; :meth:`Connection._say_goodbye`
    does it in order. Proven by ``tests/hosting/hypercorn/test_connections.py``.
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
        """As ``terminated``."""
        return self._connection.closes_after_response

    async def wait(self) -> None:
        """As ``terminated``."""
        await self._worker_context.terminated.wait()
