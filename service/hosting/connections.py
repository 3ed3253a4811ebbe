"""The open connections: hypercorn's own, counted, with the patience and the force that it lacks.

* A connection on which nothing was asked yet is not closed in the moment when its request arrives: that would reset it.
* A connection that its client has closed is gone at once, not when the keep-alive time is over.
* A client that does not read cannot hold the server. hypercorn sends under a shield without a deadline, so neither its
  ``graceful_timeout`` nor any other cancellation reaches such a connection; only closing its socket does.
  Proven by ``tests/hosting/test_connections.py``.
"""

import fcntl
import select
import termios
from array import array
from contextlib import suppress
from typing import Any, cast

import hypercorn.trio.run
import trio
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ConnectionState

from service.hosting.worker import Worker

FIRST_REQUEST_S = 0.05
"""How long a connection without a request is kept when the doors close. Its request is on its way, or it is idle."""


class Connections:
    """All connections of a worker. Made before hypercorn serves: it takes :meth:`open` for its ``TCPServer``."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._open: set[Connection] = set()
        setattr(hypercorn.trio.run, "TCPServer", self.open)  # noqa: B010

    def open(self, *args: Any) -> "Connection":
        """In place of hypercorn's ``TCPServer(app, config, context, state, stream)``."""
        return Connection(self._open, *args)

    def adopt(self, stream: trio.abc.Stream) -> None:
        """Serve a connection that hypercorn did not accept itself."""
        self._worker.server_nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: trio.abc.Stream) -> None:
        worker = self._worker
        try:
            await self.open(worker.app, worker.config, worker.context, ConnectionState({}), stream)
        finally:
            await trio.aclose_forcefully(stream)

    def abort_stalled(self) -> int:
        """Close the connections that cannot be written to; how many there were. The others wait for the event loop."""
        return self._abort([it for it in self._open if not it.is_writable()])

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

    def __init__(self, all_open: "set[Connection]", *args: Any) -> None:
        super().__init__(*args)
        self._all_open = all_open
        self._opened_at = trio.current_time()
        self._scope = trio.CancelScope()

    @property
    def is_in_handshake(self) -> bool:
        return not hasattr(self, "protocol")

    async def run(self) -> None:
        self._all_open.add(self)
        try:
            with self._scope:
                await super().run()
        finally:
            self._all_open.discard(self)

    def is_writable(self) -> bool:
        """Whether the kernel would take more for it: not so where the client has not read for a while."""
        if self._transport.socket.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._transport.socket.fileno(), select.POLLOUT)
        return bool(poll.poll(0))

    def abort(self) -> None:
        """End it without another word. What the kernel has already taken is still delivered."""
        self._scope.cancel()
        if not self.is_in_handshake:
            self._transport.socket.close()

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()  # the client has closed: nothing is left to wait for

    async def _idle_timeout(self) -> None:
        with trio.move_on_after(self.config.keep_alive_timeout):
            await self.context.terminated.wait()
        # Whoever reads a request stops this task, so everything before the shield gives it the chance to.
        await trio.lowlevel.checkpoint()
        if self.context.terminated.is_set():
            if self._has_unread():
                await trio.sleep(FIRST_REQUEST_S)
            elif not self.protocol.protocol.keep_alive_requests:
                await trio.sleep_until(self._opened_at + FIRST_REQUEST_S)
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()

    @property
    def _transport(self) -> trio.SocketStream:
        return cast("trio.SocketStream", getattr(self.stream, "transport_stream", self.stream))

    def _has_unread(self) -> bool:
        """Whether the client has sent what nobody has looked at: to close now would reset it."""
        unread = array("i", [0])
        with suppress(OSError):  # it is closed
            fcntl.ioctl(self._transport.socket.fileno(), termios.FIONREAD, unread)
        return unread[0] > 0
