"""The status that workers on the same listening sockets show each other: whether a worker still serves."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from socket import socket

import trio

_NAME = "lastcall-worker-status"


class WorkerStatus(IntEnum):
    """Whether a worker process answers clients that connect."""

    STARTING = 0
    SERVING = 1
    DRAINING = 2
    LEAVING = 3


class StatusBeacon:
    """Shows the other workers this worker's status: an anonymous file whose size is the status.

    It is made early and kept until the process is gone, with a spare descriptor: later there may be no descriptor left.
    """

    def __init__(self) -> None:
        self._file = self._spare = -1
        with suppress(OSError):  # then this worker shows no status, and others see it as starting
            self._file = os.memfd_create(_NAME)
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def show(self, status: WorkerStatus) -> None:
        with suppress(OSError):
            os.ftruncate(self._file, status)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Free the spare descriptor for a look at other processes. No other task may run inside of the context."""
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
    """Yield the status of each other child of ``parent`` that holds one of these sockets.

    The parent is the master or, if the master has died, the process that the kernel gave the workers to.
    Of several workers that show ``LEAVING`` and then look, the last one always sees that all others leave.
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
