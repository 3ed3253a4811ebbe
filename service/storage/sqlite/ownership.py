"""Who owns the open turns: each open store holds a lock that dies with its process.

The lock is one byte of a file beside the database, the byte of the owner's fence; whether it is held can be asked
without taking it. It is a lock of the open file description (``fcntl(2)``, OFD locks), so that two stores
in one process are two owners, and closing one of them does not give away the other's.
"""

import os
import struct
import weakref
from fcntl import F_OFD_GETLK, F_OFD_SETLK, F_UNLCK, F_WRLCK, fcntl
from pathlib import Path

import apsw

from service.storage.records import Owner

_FLOCK = struct.Struct("hhqqi4x")
"""``struct flock`` of Linux on 64 bits: type, whence, start, length, pid."""


class Ownership:
    """This store among the owners of a database.

    Args:
        path: The file of the locks; made if need be, never removed.
    """

    def __init__(self, path: Path) -> None:
        self.fence = 0
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # A forked child would share the lock and keep it held after this process's death.
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close(this))

    def begin(self, db: apsw.Connection, *, address: str | None, opened_at: int) -> None:
        """Become an owner; a step inside of a transaction: nobody sees the owner before its lock is held."""
        db.execute("INSERT INTO owners (address, opened_at) VALUES (?, ?)", (address, opened_at))
        self.fence = db.last_insert_rowid()
        self._call(F_OFD_SETLK, self.fence)

    def is_alive(self, fence: int) -> bool:
        """Whether an owner, this one or another, still holds its lock."""
        return fence == self.fence or self._call(F_OFD_GETLK, fence) != F_UNLCK

    def close(self) -> None:
        """Give the lock up: what is open then is anybody's to recover."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _call(self, command: int, fence: int) -> int:
        assert self._fd is not None, "the owner is closed"
        lock = fcntl(self._fd, command, _FLOCK.pack(F_WRLCK, os.SEEK_SET, fence, 1, 0))
        kind: int = _FLOCK.unpack(lock)[0]
        return kind


def _close(reference: "weakref.ref[Ownership]") -> None:
    ownership = reference()
    if ownership is not None:
        ownership.close()


def find_owner(db: apsw.Connection, session_id: str, *, besides: int) -> Owner | None:
    """The owner of a session's open turns, if it is another one than ``besides``."""
    row = db.execute(
        "SELECT fence, address FROM sessions JOIN owners ON fence = owner WHERE id = ? AND owner <> ?",
        (session_id, besides),
    ).fetchone()
    return None if row is None else Owner(fence=row[0], address=row[1])


def owner_of(db: apsw.Connection, fence: int) -> Owner:
    address: str | None = db.execute("SELECT address FROM owners WHERE fence = ?", (fence,)).get
    return Owner(fence=fence, address=address)


def fences(db: apsw.Connection) -> list[int]:
    """All owners that have not been cleared away."""
    return [int(row[0]) for row in db.execute("SELECT fence FROM owners")]


def any_alive(db: apsw.Connection, ownership: Ownership) -> bool:
    """Whether an owner besides this one lives."""
    return any(ownership.is_alive(fence) for fence in fences(db) if fence != ownership.fence)


def is_oldest(db: apsw.Connection, ownership: Ownership) -> bool:
    """Whether no owner that lives came before this one."""
    return not any(fence < ownership.fence and ownership.is_alive(fence) for fence in fences(db))
