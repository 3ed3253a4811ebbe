"""The port on which a replica answers other replicas: one listening socket, which all of its workers share.

With several workers the master binds the port and hands the socket down, so that it stays open while workers come and
go, and no worker that hangs holds up connections for the others.
"""

import os
import socket
from collections.abc import Awaitable, Callable

import trio
from hypercorn.config import Config

from service.errors import StartupError
from service.hosting.worker_main import SharedFile
from service.settings import Settings, split_host_port

BACKLOG = 1024
_SHARED = "lastcall_peer_port"


class PeerDoor:
    """Whether this worker takes connections from the port that it shares. At first it does.

    A connection that a worker takes just before its end would be lost, though it is for another worker. So a worker
    that leaves lets the others take them all: those that are for it are handed to it.
    """

    def __init__(self) -> None:
        self._wanted = trio.Event()
        self._wanted.set()
        self._taking = trio.CancelScope()

    def accept(self, wanted: bool) -> None:
        """Take connections, or leave them to other workers, until the next call."""
        if wanted:
            self._wanted.set()
        elif self._wanted.is_set():
            self._wanted = trio.Event()
            self._taking.cancel()

    async def run(self, accept: Callable[[], Awaitable[None]]) -> None:
        """Have ``accept`` take connections whenever they are wanted. It is cancelled when they are not."""
        while True:
            while not self._wanted.is_set():
                await self._wanted.wait()
            with trio.CancelScope() as self._taking:
                await accept()


def share_peer_port(config: Config, settings: Settings) -> None:
    """Bind the port for all workers, and leave the socket to them in ``config``. For the master.

    Raises:
        StartupError: The port is taken, or the address is not one of this machine.
    """
    if settings.peer_bind is not None and settings.store_capabilities.shared:
        setattr(config, _SHARED, SharedFile(_bind(settings.peer_bind).detach()))


def open_peer_port(config: Config, settings: Settings) -> socket.socket | None:
    """Return the listening socket: the master's, or a new one. None if the settings name no port.

    Raises:
        StartupError: As :func:`share_peer_port`; or there are several workers, and no socket that they share.
    """
    if settings.peer_bind is None:
        return None
    shared: SharedFile | int | None = getattr(config, _SHARED, None)
    if shared is not None:
        return socket.socket(fileno=os.dup(shared.descriptor if isinstance(shared, SharedFile) else shared))
    if config.workers > 1:
        raise StartupError(
            "peer_bind with several workers needs lastcall serve --workers, or hypercorn's "
            "--config python:service.hosting.hypercorn_config: hypercorn's own master shares no port among them."
        )
    return _bind(settings.peer_bind)


def _bind(address: str) -> socket.socket:
    host, port = split_host_port(address)
    try:
        family, kind, protocol, _, name = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartupError(f"Cannot listen on peer_bind {address}: {error.strerror}") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(name)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise StartupError(f"Cannot listen on peer_bind {address}: {error.strerror}") from error
    return listening
