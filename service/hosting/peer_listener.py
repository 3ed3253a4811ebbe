"""The peer listener: the socket on which this process answers the service's other processes for sessions that it runs.

The socket is a Unix socket with an abstract name (unix(7)). It has no file, so it leaves nothing behind, also after a
kill. It has no permissions either: the listener admits processes of the same user that prove that they know the
store's secret, which is kept beside the store. The process that sends a request on has checked its access already.

The way in which a connection ends tells whether the client behind the peer has left (see :func:`client_returns`).
"""

import os
import secrets
import select
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import trio
from hypercorn.typing import AppWrapper, ConnectionState, Scope

from service.api.http.proxy import PEER, TELL_ACCEPTED
from service.cluster.owner_beats import send_beats
from service.cluster.peer_proof import check_peer
from service.cluster.peer_socket import process_of_peer, socket_name, user_of_peer
from service.errors import StartupError
from service.hosting.hypercorn.connections import Connections
from service.hosting.hypercorn.http1_connection import Stream
from service.hosting.hypercorn.worker import Worker
from service.settings import Settings

BACKLOG = 1024
_FLAGS_FIELD = 6
_PF_EXITING = 0x4


def check_sharing(settings: Settings, *, workers: int) -> None:
    """Check that several workers share a store.

    Raises:
        StartupError: There are several workers, and each would have sessions of its own.
    """
    if workers > 1 and not settings.store_capabilities.shared:
        raise StartupError(
            f"store_url {settings.store_url} keeps sessions in one process, and there are {workers} workers; "
            "name a store that they share (LASTCALL_STORE_URL=sqlite:lastcall.db), or serve with one worker."
        )


@asynccontextmanager
async def open_peer_listener(
    worker: Worker, connections: Connections, *, serving: trio.Event, settings: Settings
) -> AsyncIterator["PeerListener | None"]:
    """Listen until the context is left. Yields None, without a listener, if the store belongs to this process alone."""
    if not settings.store_capabilities.shared:
        yield None
        return
    address = f"@lastcall-{secrets.token_hex(16)}"
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(socket_name(address))
        listener.listen(BACKLOG)
        async with trio.open_nursery() as nursery:
            yield PeerListener(address, listener, worker, connections, serving=serving, nursery=nursery)
            nursery.cancel_scope.cancel()


class PeerListener:
    """The listener for other processes. Made by :func:`open_peer_listener`.

    Args:
        nursery: Runs the loop that accepts connections, until the listener closes.

    Attributes:
        address: The address that the store tells the other processes.
    """

    def __init__(
        self,
        address: str,
        listener: trio.socket.SocketType,
        worker: Worker,
        connections: Connections,
        *,
        serving: trio.Event,
        nursery: trio.Nursery,
    ) -> None:
        self.address = address
        self._listener = listener
        self._worker = worker
        self._connections = connections
        self._serving = serving
        self._nursery = nursery

    def take_peers(self, secret: bytes) -> None:
        """Accept connections of processes that know the store's secret, once hypercorn serves.

        They close together with hypercorn's other connections.
        """
        self._nursery.start_soon(self._run, secret, name="peer listener")

    async def _run(self, secret: bytes) -> None:
        await self._serving.wait()
        listener = trio.SocketListener(self._listener)
        handler = partial(self._serve, secret=secret)
        await trio.serve_listeners(handler, [listener], handler_nursery=self._worker.server_nursery)

    async def _serve(self, stream: trio.SocketStream, *, secret: bytes) -> None:
        is_peer = user_of_peer(stream.socket) == user_of_peer(None)
        purpose = await check_peer(stream, secret, address=self.address) if is_peer else None
        if purpose is None:
            await trio.aclose_forcefully(stream)
            return
        if purpose == "beats":
            self._start_beats(stream)
            return
        worker = self._worker
        app = cast("AppWrapper", PeerApp(worker.app, stream.socket))
        connection = self._connections.open(
            app, worker.config, worker.context, ConnectionState({}), cast("Stream", stream)
        )
        await connection.run()

    def _start_beats(self, stream: trio.SocketStream) -> None:
        """Beat on a socket of its own, in a task of this listener: hypercorn's nursery would wait for the beats."""
        with suppress(OSError):  # no descriptor is left: the peer connects again
            beating = trio.SocketStream(stream.socket.dup())
            try:
                self._nursery.start_soon(send_beats, beating, name="beats")
            except RuntimeError:  # the listener is closed
                beating.socket.close()


class PeerApp:
    """The application, with a mark on each request that it comes from another process of the service."""

    def __init__(self, app: AppWrapper, peer: trio.socket.SocketType) -> None:
        self._app = app
        self._peer = peer

    async def __call__(self, scope: Any, *rest: Any) -> None:
        marks = {PEER: partial(client_returns, self._peer), TELL_ACCEPTED: partial(tell_accepted, self._peer)}
        await self._app(cast("Scope", {**scope, **marks}), *rest)


def tell_accepted(peer: trio.socket.SocketType, path: str) -> None:
    """Tell a peer, before the answer to its request, the path of the turn as which the request was accepted.

    The message is an interim response (RFC 9110, 15.2). hypercorn sends none on HTTP/1.1, so this one goes past
    hypercorn, which has not sent anything on this connection yet.
    """
    message = b"HTTP/1.1 103 \r\nlocation: " + path.encode("ascii") + b"\r\n\r\n"
    with suppress(OSError):  # the peer has gone
        os.write(peer.fileno(), message)


def client_returns(peer: trio.socket.SocketType) -> bool:
    """Whether the client of a closed connection may come back, because the peer ended the connection.

    A peer that stops closes its sending side and waits for the other side's close. After a peer's death the kernel
    closes both sides.
    """
    if peer.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(peer.fileno(), select.POLLRDHUP)
    seen = sum(events for _, events in poll.poll(0))
    if seen & select.POLLHUP:
        return _is_dying(process_of_peer(peer))
    return bool(seen & select.POLLRDHUP)


def _is_dying(process: int) -> bool:
    """Whether a process is dying: it has ``PF_EXITING`` before the kernel closes its files.

    Source: proc_pid_stat(5), ``flags``.
    """
    if process == 0:  # the process is in another PID namespace
        return False
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return True
    return bool(int(stat.rpartition(b")")[2].split()[_FLAGS_FIELD]) & _PF_EXITING)
