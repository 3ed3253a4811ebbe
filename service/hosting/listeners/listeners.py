"""hypercorn's listeners, in a form that can be closed without leaving a client waiting.

A listening socket is one object in the kernel, also with several holders. As long as one process holds it (hypercorn's
master always does), clients connect, even if no process accepts them. ``shutdown`` ends this for all holders: then the
kernel refuses new clients and resets the clients that still wait. So waiting clients are accepted first.
Source: Linux ``inet_shutdown``; proven by ``tests/hosting/listeners/test_listeners.py``.

A socket that the process was given (``--bind fd://3``, as by systemd) belongs to its giver: it is never shut down, and
clients that connect after the end wait for the next server.
"""

import socket
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import islice
from typing import cast

import trio
from hypercorn.config import Config, Sockets
from hypercorn.utils import repr_socket_addr

from service.hosting.hypercorn.http1_connection import Stream, socket_of

BACKLOG_MAX = 1024
"""Clients that may wait to be accepted: while the event loop is busy or, in a reload, until a worker is up."""
ACCEPTED_MAX = 128
"""Clients that are accepted in one step of the event loop. Trio accepts one: where a thousand come back at once, the
last of them waits for a thousand rounds, and each round takes as long as all that the first ones have asked for. A
probe behind these thousand is answered after 0.19 to 0.21 s (0.25 to 0.29 with 64)."""
SHARED_ACCEPTED_MAX = 8
"""The same where several workers accept from one socket: the first one must not take all clients of a small burst."""

Listener = trio.SocketListener | trio.SSLListener[trio.SocketStream]


class Listeners:
    """Serves hypercorn's listeners, once :meth:`serve_listeners` is installed in place of Trio's (``patches``).

    Args:
        given: For each listener, in order, whether its socket was given to the process.
        accepted_max: Bound on the clients that one listener accepts in one step of the event loop.

    Attributes:
        open: Set once clients are served.
        addresses: The listeners' addresses, once they are open: ``host:port`` or ``unix:path``.
        secure_addresses: Those of the listeners that speak TLS.
    """

    def __init__(self, given: Sequence[bool], *, accepted_max: int = ACCEPTED_MAX) -> None:
        self.open = trio.Event()
        self.addresses: Sequence[str] = ()
        self.secure_addresses: Sequence[str] = ()
        self._given = given
        self._accepted_max = accepted_max
        self._listeners: list[Listener] = []
        self._accepting = trio.CancelScope()
        self._taking = trio.CancelScope()
        self._takes_again = trio.Event()
        self._taken = 0
        self._served = trio.Event()
        self._served.set()

    def __repr__(self) -> str:
        if self.is_closed or not self.open.is_set():
            return f"<Listeners: {'closed' if self.open.is_set() else 'not open yet'}>"
        return f"<Listeners {', '.join(self.addresses)}: open>"

    @property
    def sockets(self) -> list[trio.socket.SocketType]:
        return [_socket_of(listener) for listener in self._listeners]

    async def serve_listeners(
        self,
        handler: Callable[[Stream], Awaitable[object]],
        listeners: list[Listener],
        *,
        handler_nursery: trio.Nursery,
    ) -> None:
        """Serve as Trio's ``serve_listeners`` does. Never returns, as that function."""
        self._listeners, self._handler, self._nursery = listeners, handler, handler_nursery
        for listening in self.sockets:
            listening.listen(BACKLOG_MAX)
        self.addresses = [_address(it) for it in listeners]
        self.secure_addresses = [_address(it) for it in listeners if isinstance(it, trio.SSLListener)]
        self.open.set()
        try:
            with self._accepting:
                while True:
                    with trio.CancelScope() as self._taking:
                        await self._accept_clients()
                    await self._takes_again.wait()
        finally:
            for listening in self.sockets:
                listening.close()
        await trio.sleep_forever()

    async def _accept_clients(self) -> None:
        listeners = [_SharedListener(it, accepted_max=self._accepted_max) for it in self._listeners]
        try:
            await trio.serve_listeners(self._handler, listeners, handler_nursery=self)  # type: ignore[arg-type]
        except* OSError:
            if not self.is_closed:  # otherwise the socket was shut down by _shut
                raise

    def adopt(
        self, sockets: Sockets, config: Config, handler: Callable[[Stream], Awaitable[object]], nursery: trio.Nursery
    ) -> bool:
        """Take sockets over without serving them; :meth:`stop_accepting` then answers the clients that wait.

        Returns False, and adopts nothing, if the last process on these sockets has shut them down: then no client
        waits.
        """
        context = config.create_ssl_context()
        try:
            listeners: list[Listener] = [*map(_listener_on, sockets.insecure_sockets)]
            if context is not None:
                secure = map(_listener_on, sockets.secure_sockets)
                listeners[:0] = [trio.SSLListener(it, context, https_compatible=True) for it in secure]
        except ValueError:  # Trio refuses a socket that does not listen
            return False
        self._listeners, self._handler, self._nursery = listeners, handler, nursery
        self.open.set()
        return True

    def accept_clients(self, wanted: bool) -> None:
        """Take new clients, or leave them to other processes, until the next call."""
        if wanted:
            self._takes_again.set()
        elif not self._taking.cancel_called:
            self._takes_again = trio.Event()
            self._taking.cancel()

    def stop_accepting(self, *, refuse_waiting: bool) -> None:
        """Take no more clients from here on. Only the first call counts.

        Args:
            refuse_waiting: No other process will answer: serve the clients that wait, and have the kernel refuse later
                ones. Otherwise clients wait for another process, as they always do on a socket that was given.
        """
        if self.is_closed:
            return
        self._accepting.cancel()
        if refuse_waiting:
            for listener, given in zip(self._listeners, self._given, strict=True):
                if not given:
                    self._shut(listener)

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`stop_accepting` was called."""
        return self._accepting.cancel_called

    @property
    def has_served(self) -> bool:
        """Whether every client that waited when the listeners closed has its answer, and has left."""
        return self._served.is_set()

    async def wait_served(self) -> None:
        await self._served.wait()

    def _shut(self, listener: Listener) -> None:
        with _accepting_on(listener) as listening:
            waiting = list(_accepted_on(listening))
            # At once: the kernel resets a client that connects between the last look and this.
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RD)
        for client in waiting:
            self._take(_stream_of(client, listener))

    def _take(self, stream: Stream) -> None:
        if not self._taken:
            self._served = trio.Event()
        self._taken += 1
        self._nursery.start_soon(self._serve_taken, stream)

    async def _serve_taken(self, stream: Stream) -> None:
        try:
            await self._serve(stream)
        finally:
            self._taken -= 1
            if not self._taken:
                self._served.set()

    def start_soon(self, _run_handler: object, stream: Stream, _handler: object) -> None:
        """Stand in for the nursery of Trio's handlers: Trio's handler closes every stream, also one that is closed."""
        self._nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: Stream) -> None:
        try:
            await self._handler(stream)
        finally:
            if socket_of(stream).fileno() >= 0:
                await trio.aclose_forcefully(stream)


class _SharedListener(trio.abc.Listener[Stream]):
    """A listener that stays open when Trio's ``serve_listeners`` is cancelled, and accepts several clients in one step.

    Args:
        accepted_max: Bound on the clients of one step.
    """

    def __init__(self, listener: Listener, *, accepted_max: int) -> None:
        self._listener = listener
        self._accepted_max = accepted_max
        self._accepted: deque[Stream] = deque()

    async def accept(self) -> Stream:
        """Return the next client.

        The clients that were accepted together with the last one are returned without a checkpoint: so no cancellation
        comes between them, and none is left unserved.
        """
        if self._accepted:
            return self._accepted.popleft()
        first = cast("Stream", await self._listener.accept())
        with closing(_waiting_clients(self._listener)) as others:
            self._accepted.extend(islice(others, self._accepted_max - 1))
        return first

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def _socket_of(listener: Listener) -> trio.socket.SocketType:
    transport = listener.transport_listener if isinstance(listener, trio.SSLListener) else listener
    return cast("trio.SocketListener", transport).socket


def _waiting_clients(listener: Listener) -> Generator[Stream]:
    """Accept the clients that wait, without waiting for others.

    The iterator ends early after an error of the socket, which Trio's own ``accept`` will meet again.
    """
    with _accepting_on(listener) as listening:
        for client in _accepted_on(listening):
            yield _stream_of(client, listener)


def _accepted_on(listening: socket.socket) -> Iterator[socket.socket]:
    """Accept the clients that wait at a socket whose calls do not wait. Its last call is an ``accept`` that fails."""
    with suppress(OSError):  # none waits, or another process has shut the socket
        while True:
            client, _ = listening.accept()
            yield client


@contextmanager
def _accepting_on(listener: Listener) -> Iterator[socket.socket]:
    """The listener's socket as one of the standard library, whose calls do not wait. It stays open."""
    listening = _socket_of(listener)
    accepting = socket.socket(listening.family, listening.type, listening.proto, fileno=listening.fileno())
    try:
        yield accepting
    finally:
        accepting.detach()


def _listener_on(listening: socket.socket) -> trio.SocketListener:
    return trio.SocketListener(trio.socket.from_stdlib_socket(listening))


def _address(listener: Listener) -> str:
    listening = _socket_of(listener)
    return repr_socket_addr(listening.family, listening.getsockname())


def _stream_of(client: socket.socket, listener: Listener) -> Stream:
    client.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
    if not isinstance(listener, trio.SSLListener):
        return cast("Stream", stream)
    return trio.SSLStream(stream, listener._ssl_context, server_side=True, https_compatible=True)
