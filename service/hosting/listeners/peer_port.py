"""The port on which a replica answers other replicas: one listening socket, which all of its workers share."""

import socket
from collections.abc import Awaitable, Callable

import trio
from hypercorn.config import Config

from service.hosting.listeners.shared_port import BACKLOG, SharedPort
from service.settings import Settings

__all__ = ["BACKLOG", "open_peer_port", "share_peer_port"]

_PEER_PORT = SharedPort("peer_bind")


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
    if settings.store_capabilities.shared:
        _PEER_PORT.share(config, settings.peer_bind)


def open_peer_port(config: Config, settings: Settings) -> socket.socket | None:
    """Return the listening socket: the master's, or a new one. None if the settings name no port.

    Raises:
        StartupError: As :func:`share_peer_port`; or the setting has changed since; or there are several workers, and no
            socket that they share.
    """
    return _PEER_PORT.open(config, settings.peer_bind)
