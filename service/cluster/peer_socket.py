"""The Unix sockets on which processes of this service reach each other: their names, their users, and how to connect.

A name with a leading ``@`` is abstract (unix(7)) and has no file.
"""

import os
import socket
import struct

import trio

from service.errors import ResourcesExhaustedError, is_exhaustion

_POLL_INTERVAL_S = 0.01
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_NOBODY = -1
"""The user that the kernel reports while the connection is not made, because the listener's backlog is full."""


def socket_name(name: str) -> str:
    """The kernel's form of a name: a leading ``@`` stands for the NUL of an abstract name."""
    return f"\0{name[1:]}" if name.startswith("@") else name


def user_of_peer(stream_socket: trio.socket.SocketType) -> int:
    """The user whose process is at the other end of a Unix socket."""
    return _credentials_of(stream_socket)[1]


def is_of_this_user(stream_socket: trio.socket.SocketType) -> bool:
    """Whether the process at the other end of a Unix socket has the user of this process."""
    return user_of_peer(stream_socket) == os.getuid()


def process_of_peer(stream_socket: trio.socket.SocketType) -> int:
    """The process at the other end of a Unix socket; 0 where it is not visible from here."""
    return _credentials_of(stream_socket)[0]


async def open_unix_stream(name: str) -> trio.SocketStream | None:
    """Connect to a socket, and wait as long as it takes no more connections. None if no process listens on it.

    Cancellation leaves no socket behind.

    Raises:
        ResourcesExhaustedError: This process may open no more sockets.
    """
    while True:
        try:
            stream = await trio.open_unix_socket(socket_name(name))
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
