"""Removals of sessions, with all that belongs to them, in one transaction."""

from collections.abc import Sequence

from service.storage.postgres import documents, idempotency, metadata
from service.storage.postgres.connections import Db

_EVENTS = "DELETE FROM {s}.event_pages WHERE turn IN (SELECT key FROM {s}.turns WHERE session = ANY(%s))"
_TURNS = "DELETE FROM {s}.turns WHERE session = ANY(%s)"
_SESSIONS = "DELETE FROM {s}.sessions WHERE key = ANY(%s)"


def remove_sessions(db: Db, sessions: Sequence[int]) -> None:
    """Remove sessions, by their keys, whose rows the transaction has locked.

    What open turns have in ``segments`` stays there, until their owner or its recovery removes these rows.
    """
    if not sessions:
        return
    keys = list(sessions)
    with db.pipeline():
        db.execute(_EVENTS, (keys,))
        db.execute(_TURNS, (keys,))
        documents.forget_sessions(db, keys)
        metadata.delete(db, keys)
        idempotency.cut_off(db, keys)
        db.execute(_SESSIONS, (keys,))


def remove_marked_by(db: Db, fence: int) -> None:
    """Remove the sessions that an owner has marked which is gone."""
    query = "SELECT key FROM {s}.sessions WHERE deletion = %s FOR UPDATE"
    rows = db.execute(query, (fence,)).fetchall()
    remove_sessions(db, [key for (key,) in rows])
