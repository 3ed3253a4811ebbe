"""Other processes that hold the same listening sockets: whether one of them still answers."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from socket import socket

import trio

MARK = "lastcall-leaves"


def mark_as_leaving() -> int:
    """Show the others that this process does not answer any more: a descriptor, kept until the process is gone."""
    return os.memfd_create(MARK)


def holds(pid: int, sockets: Iterable[socket | trio.socket.SocketType]) -> bool:
    """Whether a process holds one of these sockets."""
    return not _names(sockets).isdisjoint(_open_files(pid))


def others_answer(sockets: Iterable[socket | trio.socket.SocketType], *, parent: int) -> bool:
    """Whether another child of this process's parent answers at one of these sockets.

    That is the master; or, where it has died, whoever the workers were given to.
    Of several that mark themselves and then ask, at the same time or not, at least the last one is told that it is.
    """
    names = _names(sockets)
    return any(
        not names.isdisjoint(files) and not any(MARK in name for name in files)
        for files in (set(_open_files(pid)) for pid in _children(parent) if pid != os.getpid())
    )


def _names(sockets: Iterable[socket | trio.socket.SocketType]) -> set[str]:
    return {f"socket:[{os.fstat(it.fileno()).st_ino}]" for it in sockets}


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):  # gone, or not ours
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield str(entry.readlink())
