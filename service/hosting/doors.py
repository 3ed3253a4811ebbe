"""The doors: listening sockets that several processes hold.

A listening socket is one object in the kernel, whoever holds it. As long as one does, clients connect, whether anybody
accepts or not. ``shutdown`` ends the listening for all: from that moment on the kernel refuses, and who was still
waiting is reset. So it is for the last one, after having taken all who wait. Source: Linux ``inet_shutdown``.
"""

import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import trio

from service.hosting.connections import Stream
from service.hosting.worker import Listener, socket_of

MARK = "lastcall-leaves"


class Door:
    """A listening socket, kept when its listener is closed."""

    def __init__(self, listener: Listener) -> None:
        self._ssl_context = None
        if isinstance(listener, trio.SSLListener):
            self._ssl_context = listener._ssl_context
        self._socket = socket.socket(fileno=os.dup(socket_of(listener).fileno()))

    def shut(self, *, take: Callable[[Stream], None]) -> None:
        """Take all who wait and end the listening, for every process that holds the socket."""
        with suppress(OSError):  # nobody waits any more, or another one was the last one too
            while True:
                client, _ = self._socket.accept()
                take(self._stream(client))
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._socket.close()

    def _stream(self, client: socket.socket) -> Stream:
        client.setblocking(False)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
        if self._ssl_context is None:
            return cast("Stream", stream)
        return trio.SSLStream(stream, self._ssl_context, server_side=True, https_compatible=True)


def mark_as_leaving() -> int:
    """Show the other processes that this one does not answer any more: a descriptor, kept until the process is gone."""
    return os.memfd_create(MARK)


def others_answer(listeners: Iterable[Listener], *, except_for: Collection[int]) -> bool:
    """Whether another process still answers at one of these doors.

    Of several that mark themselves and then ask, at the same time or not, at least the last one is told that it is.
    """
    doors = {f"socket:[{os.fstat(socket_of(listener).fileno()).st_ino}]" for listener in listeners}
    return any(
        not doors.isdisjoint(files) and not any(MARK in name for name in files)
        for files in (set(_open_files(pid)) for pid in _processes() if pid not in except_for)
    )


def _processes() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())  # noqa: PTH208


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):  # gone, or not ours
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield str(entry.readlink())
