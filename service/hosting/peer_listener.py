"""The peer listener: where this process answers the other processes of the service, for the sessions it runs.

A Unix socket with an abstract name (unix(7)): it has no file, so nothing is left of it however the process ends, and no
permissions, so whoever connects is looked at instead: only processes of the same user are let in. Requests that come
in here were admitted by the process that sends them on.

How a connection ends says whether the client at its other end has left (see :func:`client_returns`).
"""

import secrets
import select
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import trio
from hypercorn.typing import AppWrapper, ConnectionState, Scope

from service.api.http.proxy import PEER, process_of_peer, socket_name, user_of_peer
from service.errors import StartupError
from service.hosting.hypercorn.connections import Connections, Stream
from service.hosting.hypercorn.worker import Worker
from service.settings import Settings

BACKLOG = 1024
_FLAGS_FIELD = 6
_PF_EXITING = 0x4


def check_sharing(settings: Settings, *, workers: int) -> None:
    """Raises: StartupError: There are several, and each would have sessions of its own."""
    if workers > 1 and settings.store_url == "memory:":
        raise StartupError(
            f"store_url memory: keeps sessions in one process, and there are {workers} workers; "
            "name a store that they share (LASTCALL_STORE_URL=sqlite:lastcall.db), or serve with one worker."
        )


@asynccontextmanager
async def open_peer_listener(
    worker: Worker, connections: Connections, *, serving: trio.Event, settings: Settings
) -> AsyncIterator[str | None]:
    """Listen; gives the address for the store. None, and no listener, where the store is this process's own.

    Connections are taken once ``serving`` is set, when hypercorn serves, and are closed as its own are. Leaving closes
    the listener.
    """
    if settings.store_url == "memory:":
        yield None
        return
    address = f"@lastcall-{secrets.token_hex(16)}"
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(socket_name(address))
        listener.listen(BACKLOG)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(_take_peers, listener, worker, connections, serving), name="peer listener")
            yield address
            nursery.cancel_scope.cancel()


async def _take_peers(
    listener: trio.socket.SocketType, worker: Worker, connections: Connections, serving: trio.Event
) -> None:
    await serving.wait()

    async def serve(stream: trio.SocketStream) -> None:
        if user_of_peer(stream.socket) != user_of_peer(None):
            await trio.aclose_forcefully(stream)
            return
        app = cast("AppWrapper", PeerApp(worker.app, stream.socket))
        await connections.open(app, worker.config, worker.context, ConnectionState({}), cast("Stream", stream)).run()

    await trio.serve_listeners(serve, [trio.SocketListener(listener)], handler_nursery=worker.server_nursery)


class PeerApp:
    """The application, told that its requests come from a peer."""

    def __init__(self, app: AppWrapper, peer: trio.socket.SocketType) -> None:
        self._app = app
        self._peer = peer

    async def __call__(self, scope: Any, *rest: Any) -> None:
        await self._app(cast("Scope", {**scope, PEER: partial(client_returns, self._peer)}), *rest)


def client_returns(peer: trio.socket.SocketType) -> bool:
    """Whether the peer was what ended a connection, and not the client behind it, who may come back then.

    A peer that stops closes its sending side and waits for us to close; the kernel closes all of one that has died.
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
    """Source: proc_pid_stat(5), ``flags``; a process has ``PF_EXITING`` before the kernel closes its files."""
    if process == 0:  # it is in another PID namespace
        return False
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return True
    return bool(int(stat.rpartition(b")")[2].split()[_FLAGS_FIELD]) & _PF_EXITING)
