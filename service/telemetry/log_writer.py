"""Writes lines to a descriptor and never waits for its reader.

The log may go to a pipe whose reader stalls or has gone, or to a terminal that is stopped. An ordinary write then
blocks the event loop with every turn in it, or raises an unexpected error. Here a line that cannot be written at once
waits in a bounded backlog for the next write. If the backlog is full, the line is dropped and counted.
"""

import errno
import os
import select
import socket
import stat
import threading
import time
from collections import deque
from contextlib import suppress

BACKLOG_BYTES_MAX = 1024 * 1024
"""Bound on the backlog. A stop may end a thousand turns at once, with a line of 500 bytes for each, and its report."""
PIPE_BUF = select.PIPE_BUF


class LogWriter:
    """Writes whole lines to ``fd``, from any thread. Never blocks, never raises.

    The mode of ``fd`` does not change: the parent process shares its file description, and ``O_NONBLOCK`` on a shell's
    terminal would outlive this process. A pipe or terminal is opened a second time; a socket's send takes a flag.
    """

    def __init__(self, fd: int) -> None:
        self.isatty = os.isatty(fd)
        self._fd = fd if _is_open(fd) else -1  # a closed descriptor's number may become a client's socket
        self._private_fd, self._socket = _open_without_waiting(fd)
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._begun = b""  # the rest of a line that was written in part
        self._lost = 0
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        """Write ``text``, which ends in a line end, or keep it for the next call."""
        line = text.encode("utf-8", "backslashreplace")
        with self._lock:
            if self._backlog_bytes + len(line) > BACKLOG_BYTES_MAX:
                self._lost += 1
            else:
                self._backlog.append(line)
                self._backlog_bytes += len(line)
            self._write_what_fits()

    def take_lost(self) -> int:
        """Return the number of lost lines since the last call; 0 while a line about them would be lost too."""
        with self._lock:
            if self._backlog_bytes > BACKLOG_BYTES_MAX // 2:
                return 0
            lost, self._lost = self._lost, 0
            return lost

    def drain(self, timeout_s: float) -> None:
        """Wait until all lines are written, for at most ``timeout_s``. Blocks: only for the end of the process."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while not self._write_what_fits() and (left_s := deadline - time.monotonic()) > 0:
                with suppress(OSError):
                    select.select([], [self._fd], [], min(left_s, 0.05))

    def close(self) -> None:
        """Close the descriptor or socket that this writer has opened; ``fd`` itself stays open."""
        if self._socket is not None:
            self._socket.close()
        elif self._private_fd is not None:
            os.close(self._private_fd)
        self._socket = self._private_fd = None

    def _write_what_fits(self) -> bool:
        """Write as many lines as fit. Returns whether all lines are written."""
        while line := self._begun or self._next_line():
            try:
                self._begun = line[self._write_some(line) :]
            except BlockingIOError:
                self._begun = line
                return False
            except OSError:  # the reader has gone, or the descriptor is closed
                self._begun = b""
                self._lost += 1
        return True

    def _next_line(self) -> bytes:
        if not self._backlog:
            return b""
        line = self._backlog.popleft()
        self._backlog_bytes -= len(line)
        return line

    def _write_some(self, line: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(line, socket.MSG_DONTWAIT)
        if self._private_fd is not None:
            return os.write(self._private_fd, line)
        if self._fd < 0:
            raise OSError(errno.EBADF, "never was open")
        if not select.select([], [self._fd], [], 0)[1]:
            raise BlockingIOError
        return os.write(self._fd, line[:PIPE_BUF])  # a writable pipe takes this many bytes without waiting


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open_without_waiting(fd: int) -> tuple[int | None, socket.socket | None]:
    """Open the file behind ``fd`` again, as a descriptor or a socket; both are None if that is not possible."""
    with suppress(OSError):
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):  # journald's
            return None, socket.socket(fileno=os.dup(fd))
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), None
    return None, None
