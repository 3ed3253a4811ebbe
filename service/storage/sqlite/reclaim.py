"""Reclaims the rows of removed sessions, and free pages, in steps of a bounded time.

Nobody sees or waits for it: what it deletes has been cut off before.
"""

import time

import apsw

STEP_S = 0.01
"""How long a step holds the write lock, about: it ends after the row in which this time is over."""

_FREE_PAGES_KEPT = 1024
"""Free pages that stay in the file for what comes next, beside a quarter of the file."""
_PAGES_A_STEP = 64


def reclaim_some(db: apsw.Connection) -> bool:
    """One step inside of a transaction; False once there is nothing left."""
    deadline = time.monotonic() + STEP_S
    while time.monotonic() < deadline:
        session = db.execute("SELECT key FROM sessions WHERE deletion = 2 LIMIT 1").get
        if session is None:
            return _shrink_some(db)
        if _delete_turns(db, session, deadline):
            db.execute("DELETE FROM session_settings WHERE session = ?", (session,))
            db.execute("DELETE FROM sessions WHERE key = ?", (session,))
    return True


def _delete_turns(db: apsw.Connection, session: int, deadline: float) -> bool:
    """Delete turns of a session until the deadline; whether none is left."""
    while (turn := db.execute("SELECT key FROM turns WHERE session = ? LIMIT 1", (session,)).get) is not None:
        if not (_delete_rows(db, "events", turn, deadline) and _delete_rows(db, "outputs", turn, deadline)):
            return False
        db.execute("DELETE FROM turns WHERE key = ?", (turn,))
        if time.monotonic() >= deadline:
            return False
    return True


def _delete_rows(db: apsw.Connection, table: str, turn: int, deadline: float) -> bool:
    """Delete the rows of a turn one by one until the deadline: they may be large; whether none is left."""
    for (key,) in db.execute(f"SELECT key FROM {table} WHERE turn = ?", (turn,)).fetchall():
        db.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
        if time.monotonic() >= deadline:
            return False
    return True


def _shrink_some(db: apsw.Connection) -> bool:
    """Give some free pages back to the file system where there are many; False where there are not."""
    free, pages = db.pragma("freelist_count"), db.pragma("page_count")
    if free <= _FREE_PAGES_KEPT + pages // 4:
        return False
    return shrink(db, _PAGES_A_STEP)


def shrink(db: apsw.Connection, pages: int) -> bool:
    """Move pages from the end of the file into free ones and cut it there; False where that gives nothing back.

    It does so in a file that others have rebuilt without ``auto_vacuum``, too.
    """
    free: int = db.pragma("freelist_count")
    db.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
    less: bool = db.pragma("freelist_count") < free
    return less
