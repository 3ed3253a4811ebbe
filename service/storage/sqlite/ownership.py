"""Who owns the open turns: each open store holds a lock that dies with its process.

The lock is one byte of a file beside the database, the byte of the owner's fence. The file also holds the secret by
which the owners know each other: beside the database and not in it, so that no backup carries it away.
"""

import os
from pathlib import Path
from secrets import token_bytes

import apsw

from service.storage.records import Owner
from service.storage.sqlite.ofd_locks import OfdLocks

SECRET_BYTES = 32


class Ownership:
    """This store among the owners of a database.

    Args:
        path: The file of the locks; made if need be, never removed.

    Attributes:
        secret: What all owners of this database know.
    """

    def __init__(self, path: Path) -> None:
        self.fence = 0
        self.secret = b""
        self.path = path
        self._locks: OfdLocks | None = None

    def open(self) -> None:
        """Raises: OSError."""
        self._locks = OfdLocks(self.path, flags=os.O_RDWR | os.O_CREAT)

    def begin(self, db: apsw.Connection, *, address: str | None, opened_at: int) -> None:
        """Become an owner; a step inside of a transaction: nobody sees the owner before its lock is held.

        And one owner at a time makes the secret, where there is none: the file is new, or an earlier version's.

        Raises:
            OSError
        """
        self.secret = self._find_secret() or self._make_secret()
        db.execute("INSERT INTO owners (address, opened_at) VALUES (?, ?)", (address, opened_at))
        self.fence = db.last_insert_rowid()
        self._opened.hold(self.fence)

    def _find_secret(self) -> bytes | None:
        found = os.pread(self._opened.fd, SECRET_BYTES, 0)
        # A power failure while it was made may have left a part of it, or zeros.
        return found if len(found) == SECRET_BYTES and any(found) else None

    def _make_secret(self) -> bytes:
        made = token_bytes(SECRET_BYTES)
        os.pwrite(self._opened.fd, made, 0)
        os.fsync(self._opened.fd)
        return made

    def is_alive(self, fence: int) -> bool:
        """Whether an owner, this one or another, still holds its lock."""
        return fence == self.fence or self._opened.others_hold(fence)

    def close(self) -> None:
        """Give the lock up: what is open then is anybody's to recover."""
        if self._locks is not None:
            self._locks.close()

    @property
    def _opened(self) -> OfdLocks:
        assert self._locks is not None, "the owner is not open"
        return self._locks


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
