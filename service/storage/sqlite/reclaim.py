"""Reclaims the rows of removed sessions and deleted turns, and free pages, in steps of a bounded time.

No reader sees these rows, and no caller waits: the sessions and turns were hidden before.
"""

import time

import apsw

from service.storage.sqlite import documents, event_pages, idempotency, tree_changes, trees
from service.storage.sqlite.rows import TURN_COLUMNS, Row

STEP_S = 0.01
"""The approximate time for which a step holds the write lock: it ends after the row in which this time is over."""

_FREE_PAGES_KEPT = 1024
"""Free pages that stay in the file for the next writes, beside a quarter of the file."""
_PAGES_A_STEP = 64
_FORGOTTEN_AT_ONCE = 256
_CHANGE = "SELECT key, state FROM tree_changes WHERE state IN (1, 2) LIMIT 1"
_PART = "SELECT turn, items FROM changed_parts WHERE change = ? LIMIT 1"
_FORGET = (
    "DELETE FROM changed_parts WHERE change = :change "
    "AND turn IN (SELECT turn FROM changed_parts WHERE change = :change LIMIT :limit)"
)
_FORGET_PART = "DELETE FROM changed_parts WHERE change = ? AND turn = ?"
_WITHOUT_ITEMS = f"SELECT {TURN_COLUMNS} FROM edited_turns WHERE key = ?"
_PLACE = "SELECT session, ordinal, id, parent FROM turns WHERE key = ?"


def reclaim_some(db: apsw.Connection) -> bool:
    """Do one step within a transaction. False once there is nothing left."""
    deadline = time.monotonic() + STEP_S
    while time.monotonic() < deadline:
        change: Row | None = db.execute(_CHANGE).fetchone()
        session: int | None = db.execute("SELECT key FROM sessions WHERE deletion = 2 LIMIT 1").get
        if change is not None:
            key, state = change
            finish_change(db, key, state, deadline=deadline)
        elif session is not None:
            _delete_session(db, session, deadline)
        else:
            return _shrink_some(db)
    return True


def finish_change(db: apsw.Connection, change: int, state: int, *, deadline: float) -> None:
    """Change or delete the rows of the parts until the deadline; without parts the change is forgotten."""
    if state == tree_changes.OVER:
        values = {"change": change, "limit": _FORGOTTEN_AT_ONCE}
        while db.execute(_PART, (change,)).fetchone() is not None:
            db.execute(_FORGET, values)
            if time.monotonic() >= deadline:
                return
    while (part := db.execute(_PART, (change,)).fetchone()) is not None:
        turn, items = part
        if items is None:
            _delete_turn(db, turn, deadline)
        elif items == tree_changes.EVENTS:
            if _delete_events(db, turn, deadline):
                db.execute(_FORGET_PART, (change, turn))
        else:
            _take_items(db, turn)
            db.execute(_FORGET_PART, (change, turn))
        if time.monotonic() >= deadline:
            return
    db.execute("DELETE FROM tree_changes WHERE key = ?", (change,))


def _take_items(db: apsw.Connection, key: int) -> None:
    """Write the input of a turn without the items that are deleted from it."""
    row: Row = db.execute(_WITHOUT_ITEMS, (key,)).fetchone()  # type: ignore[assignment]
    tree_changes.keep_input(db, key, event_pages.record_of(db, "", row))


def _delete_session(db: apsw.Connection, session: int, deadline: float) -> None:
    """Delete rows of a session until the deadline, the session's own row last."""
    while (turn := db.execute("SELECT key FROM turns WHERE session = ? LIMIT 1", (session,)).get) is not None:
        _delete_turn(db, turn, deadline)
        if time.monotonic() >= deadline:
            return
    if idempotency.cut_off_some(db, session):
        documents.forget_title(db, session)
        for table in ("siblings", "session_metadata", "session_settings"):
            db.execute(f"DELETE FROM {table} WHERE session = ?", (session,))
        db.execute("DELETE FROM sessions WHERE key = ?", (session,))


def _delete_turn(db: apsw.Connection, turn: int, deadline: float) -> None:
    """Delete rows of a turn, which may be large, one by one until the deadline, the turn's own row last."""
    if not (_delete_events(db, turn, deadline) and _delete_rows(db, "outputs", turn, deadline)):
        return
    session, ordinal, turn_id, parent = db.execute(_PLACE, (turn,)).fetchone()  # type: ignore[misc]
    documents.forget_turn(db, turn)
    trees.forget_place(db, session, parent, ordinal)
    idempotency.cut_off(db, session, turn_id)
    for table in ("changed_parts", "turn_marks"):
        db.execute(f"DELETE FROM {table} WHERE turn = ?", (turn,))
    db.execute("DELETE FROM turns WHERE key = ?", (turn,))


def _delete_events(db: apsw.Connection, turn: int, deadline: float) -> bool:
    return all(_delete_rows(db, table, turn, deadline) for table in ("events", "event_pages"))


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
