"""Removals of sessions: a session is hidden at once, and its rows are removed later, in pieces.

A hidden session has no id that a caller could name, and no open turns, and no query lists it. It belongs to no owner:
each owner removes some of its rows whenever it removes any.
"""

from collections.abc import Sequence

from service.storage.postgres import documents, event_pages, idempotency, metadata
from service.storage.postgres.connections import Db
from service.storage.rules import NOBODY

HIDDEN = 0
"""The ``deletion`` of a hidden session, in place of the owner that marked it."""
TURNS_MAX = 2000
"""The most turns whose rows one piece removes."""
_BYTES_MAX = 32 * 1024 * 1024
"""Bound on the texts of these turns, unless one turn has more."""
_SESSIONS_MAX = 100
"""The most sessions that one step hides, or removes."""

# What their owner still does with them finds them closed, as if they were gone.
_CLOSE_TURNS = (
    "UPDATE {s}.turns SET owner = NULL, segment = NULL, state = 'interrupted' FROM {s}.sessions AS s "
    f"WHERE s.key = ANY(%s) AND turns.owner = ANY(ARRAY[s.owner, {NOBODY}]) AND turns.session = s.key "
    "AND turns.owner IS NOT NULL"
)
_HIDE = "UPDATE {s}.sessions SET id = '+' || key, deletion = 0, owner = NULL, open_turns = 0 WHERE key = ANY(%s)"
_TAKE_MARKED = "SELECT key FROM {s}.sessions WHERE deletion = %s LIMIT %s FOR UPDATE SKIP LOCKED"
_TURNS = (
    "SELECT key FROM (SELECT key, sum(text_bytes) OVER (ORDER BY key) - text_bytes AS before FROM ("
    "SELECT key, text_bytes FROM {s}.turns WHERE session = ANY(%(sessions)s) LIMIT %(limit)s) AS first) AS taken "
    "WHERE before < %(bytes)s"
)
_HAS_TURNS = "SELECT EXISTS (SELECT FROM {s}.turns WHERE session = ANY(%s))"
_DELETE_TURNS = "DELETE FROM {s}.turns WHERE key = ANY(%s)"
_DELETE_SESSIONS = "DELETE FROM {s}.sessions WHERE key = ANY(%s)"


def hide(db: Db, sessions: Sequence[int]) -> None:
    """Remove sessions for every reader, by their keys, whose rows the transaction has locked. Their ids are free.

    What open turns have in ``segments`` stays there, until their owner or its recovery removes these rows.
    """
    if not sessions:
        return
    keys = list(sessions)
    with db.pipeline():
        db.execute(_CLOSE_TURNS, (keys,))
        db.execute(_HIDE, (keys,))
        idempotency.cut_off(db, keys)


def hide_marked_by(db: Db, fence: int) -> bool:
    """Hide some of the sessions that an owner has marked which is gone. Returns whether there were any."""
    rows = db.execute(_TAKE_MARKED, (fence, _SESSIONS_MAX)).fetchall()
    hide(db, [key for (key,) in rows])
    return bool(rows)


def remove_some(db: Db) -> bool:
    """Remove a piece of what is hidden, but what others are removing. Returns whether there was any."""
    sessions = [key for (key,) in db.execute(_TAKE_MARKED, (HIDDEN, _SESSIONS_MAX)).fetchall()]
    if not sessions:
        return False
    values = {"sessions": sessions, "limit": TURNS_MAX, "bytes": _BYTES_MAX}
    turns = [key for (key,) in db.execute(_TURNS, values).fetchall()]
    if turns:
        with db.pipeline():
            remove_turns(db, turns)
        if db.execute(_HAS_TURNS, (sessions,)).fetchone() != (False,):
            return True
    if idempotency.cut_off(db, sessions).rowcount < idempotency.CUT_OFF_MAX:
        remove_empty(db, sessions)
    return True


def remove_turns(db: Db, turns: Sequence[int]) -> None:
    """Remove turns, by their keys, with their events and what they have in the index."""
    event_pages.drop(db, turns)
    documents.forget_turns(db, turns)
    db.execute(_DELETE_TURNS, (list(turns),))


def remove_empty(db: Db, sessions: Sequence[int]) -> None:
    """Remove sessions without turns, by their keys, whose rows the transaction has locked."""
    keys = list(sessions)
    with db.pipeline():
        documents.forget_sessions(db, keys)
        metadata.delete(db, keys)
        idempotency.cut_off(db, keys)
        db.execute(_DELETE_SESSIONS, (keys,))
