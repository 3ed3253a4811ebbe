"""Locks on the bytes of a file that a process has open, which die with the process.

These are locks of the open file description (``fcntl(2)``, OFD locks): two descriptors that were opened apart are two
holders, also in one process. A holder can ask whether another one has locked a byte, without locking it.
"""

import os
import struct
from fcntl import F_OFD_GETLK, F_OFD_SETLK, F_RDLCK, F_UNLCK, F_WRLCK, fcntl

_FLOCK = struct.Struct("hhqqi4x")
"""``struct flock`` of Linux on 64 bits: type, whence, start, length, pid."""


def lock(fd: int, start: int, *, shared: bool = False) -> None:
    """Lock a byte. Raises: OSError: Another holder has it, or this file system has no locks."""
    _call(fd, F_OFD_SETLK, F_RDLCK if shared else F_WRLCK, start, 1)


def unlock(fd: int, start: int) -> None:
    """Release a byte. Raises: OSError: The kernel has no memory."""
    _call(fd, F_OFD_SETLK, F_UNLCK, start, 1)


def others_hold(fd: int, start: int, *, length: int = 1) -> bool:
    """Whether another holder has locked one of these bytes, shared or not. Raises: OSError."""
    return length > 0 and _call(fd, F_OFD_GETLK, F_WRLCK, start, length) != F_UNLCK


def _call(fd: int, command: int, kind: int, start: int, length: int) -> int:
    answer = fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    found: int = _FLOCK.unpack(answer)[0]
    return found
