"""The reserve: a file beside the database that holds space for deletions, and is cut when the disk is full.

A deletion writes before it frees space: to the log, and to the database when the log is written back.
"""

import errno
import os
from pathlib import Path

import structlog

logger = structlog.get_logger("lastcall.store")

RESERVE_BYTES = 8 * 1024 * 1024
"""More than the log holds when the disk gets full: 1000 pages and the steps of one commit. Writing it back may lengthen
the file by so much before the log can be cut."""
_PART_BYTES = 256 * 1024
"""The reserve grows in parts of this size, so that a nearly full disk gives as much as it has."""


class Reserve:
    """The reserve of one store. All owners of the store use the same file."""

    def __init__(self, path: Path) -> None:
        self.is_short = False
        """Whether the disk could not give the whole reserve at the last attempt."""
        self._fd: int | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self.fill()
        except OSError as error:
            self._do_without(error)

    def fill(self) -> None:
        """Take the missing part of the reserve from the disk, as far as the disk has space."""
        if self._fd is None:
            return
        try:
            for start in range(os.fstat(self._fd).st_size, RESERVE_BYTES, _PART_BYTES):
                os.posix_fallocate(self._fd, start, _PART_BYTES)
            self.is_short = False
        except OSError as error:
            self.is_short = True
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._do_without(error)

    def release(self) -> None:
        """Give the whole reserve to the disk, for the next write only; call :meth:`fill` after it."""
        if self._fd is not None:
            os.ftruncate(self._fd, 0)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _do_without(self, error: OSError) -> None:
        logger.warning("no space can be reserved: deletions may fail on a full disk", error=error.strerror)
        self.close()
        self.is_short = False
