"""The sockets on which processes of this service reach each other: their names, their users, and how to connect.

A peer's address is the name of a Unix socket. A name with a leading ``@`` is abstract (unix(7)) and has no file.
"""

import os
import socket
import struct

import trio

from service.errors import ResourcesExhaustedError, is_exhaustion
from service.freezes import move_on_after

_CONNECT_TIMEOUT_S = 2.0
_POLL_INTERVAL_S = 0.01
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_NOBODY = -1
"""The user that the kernel reports while the connection is not made, because the listener's backlog is full."""


def socket_name(address: str) -> str:
    """The kernel's name of a peer's address: a leading ``@`` stands for the NUL of an abstract name."""
    return f"\0{address[1:]}" if address.startswith("@") else address


def user_of_peer(stream_socket: trio.socket.SocketType | None) -> int:
    """The user whose process is at the other end of a Unix socket; without one, this process's own."""
    return os.getuid() if stream_socket is None else _credentials_of(stream_socket)[1]


def process_of_peer(stream_socket: trio.socket.SocketType) -> int:
    """The process at the other end of a Unix socket; 0 where it is not visible from here."""
    return _credentials_of(stream_socket)[0]


async def connect_to_peer(address: str) -> trio.SocketStream | None:
    """Connect to a peer; the caller closes the connection. None if no process answers at this address.

    Cancellation leaves no socket behind.

    Raises:
        ResourcesExhaustedError: This process may open no more sockets.
    """
    with move_on_after(_CONNECT_TIMEOUT_S):
        return await wait_for_peer(address)
    return None


async def wait_for_peer(address: str) -> trio.SocketStream | None:
    """Connect as :func:`connect_to_peer` does, but wait as long as the peer takes no more connections."""
    while True:
        try:
            stream = await trio.open_unix_socket(socket_name(address))
        except OSError as error:
            if is_exhaustion(error.errno):
                raise ResourcesExhaustedError from error
            return None
        if user_of_peer(stream.socket) != _NOBODY:
            return stream
        stream.socket.close()  # the backlog is full; Trio does not notice that the kernel refused
        await trio.sleep(_POLL_INTERVAL_S)


def _credentials_of(stream_socket: trio.socket.SocketType) -> tuple[int, int, int]:
    """Source: unix(7), ``SO_PEERCRED``."""
    credentials = stream_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, group = _CREDENTIALS.unpack(credentials)
    return process, user, group
