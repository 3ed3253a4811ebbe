"""Who owns the open turns: each open store holds a lock that dies with its process.

The lock is one byte of a file beside the database, at the position of the owner's fence. The file also holds the
secret by which the owners know each other. The secret is not in the database, so that no backup contains it.
"""

import os
from pathlib import Path
from secrets import token_bytes

import apsw

from service.storage import rules
from service.storage.records import OpenTurn, Owner
from service.storage.sqlite.ofd_locks import OfdLocks

SECRET_BYTES = 32


class Ownership:
    """This store among the owners of a database.

    Args:
        path: The file of the locks; made if necessary, never removed.

    Attributes:
        secret: The secret that all owners of this database know.
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
        """Become an owner. A step within a transaction, so that other processes see the owner only with its lock.

        The transaction also lets only one owner make the secret, if the file is new or of an earlier version.

        Raises:
            OSError
        """
        self.secret = self._find_secret() or self._make_secret()
        db.execute("INSERT INTO owners (address, opened_at) VALUES (?, ?)", (address, opened_at))
        self.fence = db.last_insert_rowid()
        self._opened.hold(self.fence)

    def _find_secret(self) -> bytes | None:
        found = os.pread(self._opened.fd, SECRET_BYTES, 0)
        # After a power failure the file may hold only a part of the secret, or zeros.
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
        """Release the lock: from now on other owners may recover the open turns."""
        if self._locks is not None:
            self._locks.close()

    @property
    def _opened(self) -> OfdLocks:
        assert self._locks is not None, "the owner is not open"
        return self._locks


def find_owner(db: apsw.Connection, session_id: str, *, besides: int) -> Owner | None:
    """The owner of a session's open turns, if it is not ``besides``."""
    row = db.execute(
        "SELECT fence, address FROM sessions JOIN owners ON fence = owner WHERE id = ? AND owner <> ?",
        (session_id, besides),
    ).fetchone()
    return None if row is None else Owner(fence=row[0], address=row[1])


def find_open_turn(db: apsw.Connection, session_id: str, turn_id: str, *, me: int) -> OpenTurn | None:
    """As :meth:`~service.storage.store.Store.find_open_turn` says."""
    row = db.execute(
        "SELECT turns.owner, sessions.owner, fence, address FROM turns JOIN sessions ON sessions.key = session "
        "LEFT JOIN owners ON fence = sessions.owner "
        "WHERE turns.id = ? AND sessions.id = ? AND turns.owner IS NOT NULL AND deletion = 0",
        (turn_id, session_id),
    ).fetchone()
    return None if row is None else rules.open_turn_of(*row, me=me)


def owner_of(db: apsw.Connection, fence: int) -> Owner:
    address: str | None = db.execute("SELECT address FROM owners WHERE fence = ?", (fence,)).get
    return Owner(fence=fence, address=address)


def fences(db: apsw.Connection) -> list[int]:
    """All owners whose rows were not removed yet."""
    return [int(row[0]) for row in db.execute("SELECT fence FROM owners")]


def any_alive(db: apsw.Connection, ownership: Ownership) -> bool:
    """Whether an owner besides this one lives."""
    return any(ownership.is_alive(fence) for fence in fences(db) if fence != ownership.fence)


def is_oldest(db: apsw.Connection, ownership: Ownership) -> bool:
    """Whether this is the oldest owner that lives."""
    return not any(fence < ownership.fence and ownership.is_alive(fence) for fence in fences(db))
