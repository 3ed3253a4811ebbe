"""The steps about idempotency keys, each within a transaction. A step refuses before its first write.

A key refers to the number of its session. A removal of the session, or of turns, does not look at keys: they are cut
off later, with the other rows, before the number may be used again.
"""

from datetime import datetime

import apsw

from service.errors import RepeatedError
from service.storage import rules
from service.storage.moments import moment
from service.storage.records import IdempotencyKey
from service.storage.sqlite.rows import Row

_FIND = "SELECT fingerprint, session, session_id, turn, first_turn FROM idempotency_keys WHERE caller = ? AND key = ?"
_KEEP = (
    "INSERT INTO idempotency_keys (caller, key, fingerprint, session, session_id, turn, first_turn) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_SESSION_EXISTS = "SELECT deletion = 0 AND (open_turns > 0 OR expires_at > ?) FROM sessions WHERE key = ?"
_TURN_EXISTS = "SELECT 1 FROM shown_turns WHERE id = ? AND session = ?"
_SOME = "(caller, key) IN (SELECT caller, key FROM idempotency_keys WHERE {condition} LIMIT :limit)"
_CUT_OFF = f"UPDATE idempotency_keys SET session = NULL WHERE {_SOME.format(condition='session = :session')}"
_NOTE_GONE = (
    f"UPDATE idempotency_keys SET gone_at = :now WHERE {_SOME.format(condition='session IS NULL AND gone_at IS NULL')}"
)
_FORGET = f"DELETE FROM idempotency_keys WHERE {_SOME.format(condition='session IS NULL AND gone_at <= :until')}"
_CUT_OFF_TURN = "UPDATE idempotency_keys SET session = NULL WHERE session = ? AND turn = ?"
_CUT_OFF_AT_ONCE = 100


def check(db: apsw.Connection, key: IdempotencyKey | None, now: datetime) -> None:
    """Raises: RepeatedError: The key is kept."""
    if key is None:
        return
    row: Row | None = db.execute(_FIND, (key.caller, key.key)).fetchone()
    if row is not None:
        fingerprint, session, session_id, turn, first_turn = row
        raise RepeatedError(
            fingerprint=fingerprint,
            session_id=session_id,
            turn_id=turn,
            first_turn_id=first_turn,
            is_gone=not _exists(db, session, turn, now),
        )


def _exists(db: apsw.Connection, session: int | None, turn: str | None, now: datetime) -> bool:
    if session is None or not db.execute(_SESSION_EXISTS, (moment(now), session)).get:
        return False
    return turn is None or db.execute(_TURN_EXISTS, (turn, session)).fetchone() is not None


def keep(
    db: apsw.Connection,
    key: IdempotencyKey | None,
    *,
    session: int,
    session_id: str,
    turn: str | None = None,
    first_turn: str | None = None,
) -> None:
    """Keep the key of a step, which :func:`check` has let pass, with what the step has made."""
    if key is not None:
        db.execute(_KEEP, (key.caller, key.key, key.fingerprint, session, session_id, turn, first_turn))


def cut_off(db: apsw.Connection, session: int, turn: str) -> None:
    """Cut the key of a deleted turn off from it."""
    db.execute(_CUT_OFF_TURN, (session, turn))


def cut_off_some(db: apsw.Connection, session: int) -> bool:
    """Cut some keys of a removed session off from its number. Returns whether none is left."""
    db.execute(_CUT_OFF, {"session": session, "limit": _CUT_OFF_AT_ONCE})
    return db.changes() < _CUT_OFF_AT_ONCE


def forget(db: apsw.Connection, now: datetime, limit: int) -> bool:
    """Forget some keys, as :meth:`~service.storage.store.Store.forget_keys` says."""
    db.execute(_NOTE_GONE, {"now": moment(now), "limit": limit})
    noted = db.changes()
    db.execute(_FORGET, {"until": moment(rules.forgotten_until(now)), "limit": limit})
    return limit in (noted, db.changes())
