"""Lines on a descriptor, without ever waiting for its reader.

A log goes to a pipe whose reader may stall, to a terminal that is stopped, or to a reader that has gone. An ordinary
write then blocks the event loop with every turn in it, or raises where nobody expects it. Here a line that cannot be
written at once waits in a bounded backlog; beyond that it is dropped, and counted in the next line that gets through.
"""

import os
import select
import socket
import stat
import threading
import time
from collections import deque
from contextlib import suppress

BACKLOG_BYTES_MAX = 256 * 1024


class LogWriter:
    """Writes whole lines to ``fd``, from any thread. Never blocks, never raises.

    The descriptor's own mode is left alone: it may be shared with a shell, where ``O_NONBLOCK`` would outlive us.
    """

    def __init__(self, fd: int) -> None:
        self.lost = 0
        self._fd = fd
        self._send = _never_blocking(fd)
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._begun = b""  # the rest of a line of which a part went through
        self._lock = threading.Lock()

    @property
    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, text: str) -> None:
        """Write ``text``, which ends in a line end, or keep it for the next call."""
        line = text.encode("utf-8", "backslashreplace")
        with self._lock:
            if self._backlog_bytes + len(line) > BACKLOG_BYTES_MAX:
                self.lost += 1
            else:
                self._backlog.append(line)
                self._backlog_bytes += len(line)
            self._write_what_fits()

    def drain(self, timeout_s: float) -> None:
        """Wait until all is written, at most so long. Blocks: for the very end, where nothing else runs."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while self._write_what_fits() and (left_s := deadline - time.monotonic()) > 0:
                with suppress(OSError, ValueError):
                    select.select([], [self._fd], [], min(left_s, 0.05))

    def _write_what_fits(self) -> bool:
        """Whether something is left that a reader may still take."""
        while line := self._begun or self._next_line():
            try:
                sent = self._send(line)
            except BlockingIOError:
                self._begun = line
                return True
            except OSError:  # the reader has gone, or the descriptor is closed
                self.lost += 1
                self._begun = b""
                continue
            self._begun = line[sent:]
        return False

    def _next_line(self) -> bytes:
        if self._backlog:
            line = self._backlog.popleft()
            self._backlog_bytes -= len(line)
            return line
        return b""


def _never_blocking(fd: int):  # type: ignore[no-untyped-def]
    """A ``write(data) -> sent`` to the file behind ``fd`` that raises BlockingIOError rather than wait."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return lambda data: os.write(fd, data)
    if stat.S_ISSOCK(mode):  # journald's
        return lambda data: socket.socket(fileno=os.dup(fd)).send(data, socket.MSG_DONTWAIT)
    return lambda data: os.write(fd, data)
