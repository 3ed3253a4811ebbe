"""Lines on a descriptor, without ever waiting for its reader.

A log goes to a pipe whose reader may stall, to a terminal that is stopped, or to a reader that has gone. An ordinary
write then blocks the event loop with every turn in it, or raises where nobody expects it. Here a line that cannot be
written at once waits in a bounded backlog for the next one; beyond that it is dropped and counted.
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
"""A stop ends a thousand turns at once, and each has a line of some 500 bytes. The report of the stop follows them."""
PIPE_BUF = select.PIPE_BUF


class LogWriter:
    """Writes whole lines to ``fd``, from any thread. Never blocks, never raises.

    The mode of ``fd`` is left alone: its description is shared with whoever started us, and ``O_NONBLOCK`` on a shell's
    terminal would outlive this process. A pipe or terminal is opened once more for us, a socket has a flag to a send.
    """

    def __init__(self, fd: int) -> None:
        self.isatty = os.isatty(fd)
        self._fd = fd if _is_open(fd) else -1  # a closed one's number may become a client's socket
        self._private_fd, self._socket = _open_without_waiting(fd)
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._begun = b""  # what remains of a line that went through in part
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
        """How many lines were lost since this was asked last; 0 as long as a line that tells it would be lost too."""
        with self._lock:
            if self._backlog_bytes > BACKLOG_BYTES_MAX // 2:
                return 0
            lost, self._lost = self._lost, 0
            return lost

    def drain(self, timeout_s: float) -> None:
        """Wait until all is written, at most so long. Blocks: for the very end, when nothing else runs."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while not self._write_what_fits() and (left_s := deadline - time.monotonic()) > 0:
                with suppress(OSError):
                    select.select([], [self._fd], [], min(left_s, 0.05))

    def close(self) -> None:
        """Give back what was opened here; ``fd`` itself stays open."""
        if self._socket is not None:
            self._socket.close()
        elif self._private_fd is not None:
            os.close(self._private_fd)
        self._socket = self._private_fd = None

    def _write_what_fits(self) -> bool:
        """Whether nothing is left to write."""
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
        return os.write(self._fd, line[:PIPE_BUF])  # what is writable takes so much without waiting


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open_without_waiting(fd: int) -> tuple[int | None, socket.socket | None]:
    """A descriptor, or a socket, of our own for the file behind ``fd``; neither where there is no such way."""
    with suppress(OSError):
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):  # journald's
            return None, socket.socket(fileno=os.dup(fd))
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), None
    return None, None
