"""Locks on the bytes of a file or of a folder, which die with the process that holds them.

These are locks of the open file description (``fcntl(2)``, OFD locks): two stores in one process are two holders, and
closing one store does not release the locks of the other. A holder can test a byte without locking it.
"""

import os
import weakref
from pathlib import Path

from service.byte_locks import lock, others_hold


class OfdLocks:
    """The locks of one holder. Raises: OSError: The path cannot be opened.

    Args:
        flags: Flags of ``open(2)``. A shared lock needs no right to write, so a folder can be locked, too.
    """

    def __init__(self, path: Path, *, flags: int) -> None:
        self._fd: int | None = os.open(path, flags | os.O_CLOEXEC, 0o600)
        # A forked child would share the locks and keep them held after this process's death.
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close(this))

    @property
    def fd(self) -> int:
        assert self._fd is not None, "the locks are given up"
        return self._fd

    def hold(self, start: int, *, shared: bool = False) -> None:
        """Lock a byte. Raises: OSError: Another holder has it, or this file system has no locks."""
        lock(self.fd, start, shared=shared)

    def others_hold(self, start: int, *, length: int = 1) -> bool:
        """Whether another holder has locked one of these bytes, shared or not."""
        return others_hold(self.fd, start, length=length)

    def close(self) -> None:
        """Release all locks. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _close(reference: "weakref.ref[OfdLocks]") -> None:
    locks = reference()
    if locks is not None:
        locks.close()
