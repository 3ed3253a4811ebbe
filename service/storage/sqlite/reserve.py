"""Space on the disk that is kept for what makes space: a file beside the database, which is cut when the disk is full.

A deletion writes before it frees anything: to the log, and to the file when the log is written back.
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
"""It is taken in such parts: of a disk that is nearly full, what there is."""


class Reserve:
    """The reserve of one store. Of several owners each gives and takes the same file."""

    def __init__(self, path: Path) -> None:
        self.is_short = False
        """Whether the disk did not have all of it when it was last asked."""
        self._fd: int | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self.fill()
        except OSError as error:
            self._do_without(error)

    def fill(self) -> None:
        """Take from the disk what is missing, as far as there is something."""
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
        """Give all of it to the disk, for the one write that comes next; then :meth:`fill`."""
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
