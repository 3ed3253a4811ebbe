"""What the workers on the same listening sockets show each other: whether one of them still serves."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from socket import socket

import trio

_NAME = "lastcall-worker-status"


class WorkerStatus(IntEnum):
    """How a process answers clients that connect."""

    STARTING = 0
    SERVING = 1
    DRAINING = 2
    LEAVING = 3


class StatusBeacon:
    """Shows the other workers this worker's status: an anonymous file whose size is the status.

    Made early and kept until the process is gone, with a descriptor to spare: when it matters there may be none left.
    """

    def __init__(self) -> None:
        self._file = self._spare = -1
        with suppress(OSError):  # then it shows nothing, and counts as one that starts
            self._file = os.memfd_create(_NAME)
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def show(self, status: WorkerStatus) -> None:
        with suppress(OSError):
            os.ftruncate(self._file, status)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look around inside, in one go, with the descriptor that was spared for that."""
        spare, self._spare = self._spare, -1
        with suppress(OSError):
            os.close(spare)
        try:
            yield
        finally:
            with suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def holds_socket(pid: int, sockets: Iterable[socket | trio.socket.SocketType]) -> bool:
    """Whether a process holds one of these sockets."""
    return not _names(sockets).isdisjoint(_open_files(pid).values())


def statuses_of_others(sockets: Iterable[socket | trio.socket.SocketType], *, parent: int) -> Iterator[WorkerStatus]:
    """How the other children of this process's parent stand that hold one of these sockets.

    The parent is the master; or, where it has died, whoever the workers were given to.
    Of several that show that they leave and then ask, at the same time or not, the last one sees that all others do.
    """
    names = _names(sockets)
    for pid in _children(parent):
        if pid != os.getpid() and not names.isdisjoint((files := _open_files(pid)).values()):
            yield _status(files)


def _status(files: dict[Path, str]) -> WorkerStatus:
    for path, name in files.items():
        if _NAME in name:
            with suppress(OSError):
                return WorkerStatus(path.stat().st_size)
    return WorkerStatus.STARTING


def _names(sockets: Iterable[socket | trio.socket.SocketType]) -> set[str]:
    return {f"socket:[{os.fstat(it.fileno()).st_ino}]" for it in sockets}


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _open_files(pid: int) -> dict[Path, str]:
    files = {}
    with suppress(OSError):  # gone, or not ours
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                files[entry] = str(entry.readlink())
    return files
