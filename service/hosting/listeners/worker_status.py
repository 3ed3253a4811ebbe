"""The status that workers of one master show each other: whether a worker still serves.

A status is a lock on one byte of a file that all workers of the master have open: the byte of the worker's process id,
in the range of its status. To ask whether another worker has a status is one system call that never waits, however
many workers there are and whatever they have open. The kernel drops a lock with its process, so a dead worker has no
status. Source: fcntl(2), open file description locks.
"""

import os
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

from service.byte_locks import lock, others_hold, unlock

_RANGE = 1 << 32
"""Bytes of each status: more than there are process ids."""
_SPAWNED = b"--multiprocessing-fork"
"""In the command line of a process that multiprocessing has spawned, as it spawns workers."""


class WorkerStatus(IntEnum):
    """Whether a worker process answers clients that connect."""

    STARTING = 0
    SERVING = 1
    DRAINING = 2
    LEAVING = 3


class StatusBeacon:
    """Shows a worker's status to the other workers, and reads theirs.

    Args:
        file: A descriptor of the workers' common file, opened by this process; None where there is none: then this
            worker shows no status and takes the others for starting.
    """

    def __init__(self, file: int | None) -> None:
        self._file = file
        self._shown: WorkerStatus | None = None

    def show(self, status: WorkerStatus) -> None:
        """Show this status from now on."""
        before, self._shown = self._shown, status
        if self._file is None or before is status:
            return
        with suppress(OSError):  # the kernel has no memory for a lock
            lock(self._file, status * _RANGE + os.getpid(), shared=True)
            if before is not None:
                unlock(self._file, before * _RANGE + os.getpid())

    def another_is(self, status: WorkerStatus) -> bool:
        """Whether another worker shows this status.

        Of several workers that show ``LEAVING`` and then ask, the last one always finds that all others leave.
        """
        return self._is_shown(status * _RANGE, _RANGE)

    def shows_any(self, pid: int) -> bool:
        """Whether a worker with this process id shows a status."""
        return any(self._is_shown(status * _RANGE + pid, 1) for status in WorkerStatus)

    def stops(self, pid: int) -> bool:
        """Whether another worker with this process id shows that it drains or leaves."""
        return any(self._is_shown(it * _RANGE + pid, 1) for it in (WorkerStatus.DRAINING, WorkerStatus.LEAVING))

    def _is_shown(self, start: int, length: int) -> bool:
        if self._file is None:
            return False
        return others_hold(self._file, start, length=length)


class Siblings:
    """The other workers of hypercorn's own master, which does not tell its workers when it starts one.

    Args:
        master: The process id of the master.
    """

    def __init__(self, master: int) -> None:
        self._list = _open(f"/proc/{master}/task/{master}/children")  # kept open: later no descriptor may be left
        self._others = {pid for pid in self._pids() if not _is_worker(pid)}  # as multiprocessing's resource tracker

    def one_starts(self, beacon: StatusBeacon) -> bool:
        """Whether a worker runs that shows no status yet."""
        pids = [pid for pid in self._pids() if pid not in self._others]
        return any(not beacon.shows_any(pid) and _is_worker(pid) for pid in pids)

    def _pids(self) -> list[int]:
        """Return the master's children without this process."""
        with suppress(OSError):  # the master has died: it starts no worker any more
            if self._list is not None:
                return [pid for pid in map(int, os.pread(self._list, 1 << 16, 0).split()) if pid != os.getpid()]
        return []


def open_common_file(path: str) -> int | None:
    """Open the workers' common file; None where there is none. Each process has to open it by itself."""
    return _open(path, os.O_RDWR)


def _open(path: str, flags: int = os.O_RDONLY) -> int | None:
    with suppress(OSError):
        return os.open(path, flags | os.O_CLOEXEC)
    return None


def _is_worker(pid: int) -> bool:
    """Whether a child of the master is a worker; also where no descriptor is left to find out."""
    try:
        return _SPAWNED in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
