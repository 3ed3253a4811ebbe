"""Reclaims the rows of removed sessions, and free pages, in steps of a bounded time.

No reader sees these rows, and no caller waits: the sessions were hidden before.
"""

import time

import apsw

from service.storage.sqlite import documents, idempotency

STEP_S = 0.01
"""The approximate time for which a step holds the write lock: it ends after the row in which this time is over."""

_FREE_PAGES_KEPT = 1024
"""Free pages that stay in the file for the next writes, beside a quarter of the file."""
_PAGES_A_STEP = 64


def reclaim_some(db: apsw.Connection) -> bool:
    """Do one step within a transaction. False once there is nothing left."""
    deadline = time.monotonic() + STEP_S
    while time.monotonic() < deadline:
        session = db.execute("SELECT key FROM sessions WHERE deletion = 2 LIMIT 1").get
        if session is None:
            return _shrink_some(db)
        if _delete_turns(db, session, deadline) and idempotency.cut_off_some(db, session):
            documents.forget_title(db, session)
            for table in ("siblings", "session_metadata", "session_settings"):
                db.execute(f"DELETE FROM {table} WHERE session = ?", (session,))
            db.execute("DELETE FROM sessions WHERE key = ?", (session,))
    return True


def _delete_turns(db: apsw.Connection, session: int, deadline: float) -> bool:
    """Delete turns of a session until the deadline. Returns whether none is left."""
    while (turn := db.execute("SELECT key FROM turns WHERE session = ? LIMIT 1", (session,)).get) is not None:
        if not all(_delete_rows(db, table, turn, deadline) for table in ("events", "event_pages", "outputs")):
            return False
        documents.forget_turn(db, turn)
        db.execute("DELETE FROM turns WHERE key = ?", (turn,))
        if time.monotonic() >= deadline:
            return False
    return True


def _delete_rows(db: apsw.Connection, table: str, turn: int, deadline: float) -> bool:
    """Delete the rows of a turn, which may be large, one by one until the deadline. Returns whether none is left."""
    for (key,) in db.execute(f"SELECT key FROM {table} WHERE turn = ?", (turn,)).fetchall():
        db.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
        if time.monotonic() >= deadline:
            return False
    return True


def _shrink_some(db: apsw.Connection) -> bool:
    """Give some free pages back to the file system if there are many. False if there are not many."""
    free, pages = db.pragma("freelist_count"), db.pragma("page_count")
    if free <= _FREE_PAGES_KEPT + pages // 4:
        return False
    return shrink(db, _PAGES_A_STEP)


def shrink(db: apsw.Connection, pages: int) -> bool:
    """Move pages from the end of the file into free pages, and cut the file. False if this frees no space.

    Returns False for a file that was rebuilt without ``auto_vacuum``, too.
    """
    free: int = db.pragma("freelist_count")
    db.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
    less: bool = db.pragma("freelist_count") < free
    return less
