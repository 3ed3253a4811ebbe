"""The steps about idempotency keys, each within a transaction.

A key refers to the number of its session. A removal of the session cuts the key off, so that it is forgotten in time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from service.errors import RefusedError, RepeatedError
from service.storage import rules
from service.storage.moments import moment
from service.storage.postgres.connections import Cursor, Db
from service.storage.records import IdempotencyKey

# One statement: a session or a turn that is gone has no row to join.
_FIND = (
    "SELECT k.fingerprint, k.session_id, k.turn, k.first_turn, "
    "s.key IS NOT NULL AND (k.turn IS NULL OR t.key IS NOT NULL) FROM {s}.idempotency_keys k "
    "LEFT JOIN {s}.sessions s ON s.key = k.session AND s.deletion IS NULL "
    "AND (s.open_turns > 0 OR s.expires_at > %(now)s) "
    "LEFT JOIN {s}.turns t ON t.id = k.turn AND t.session = k.session "
    "WHERE k.caller = %(caller)s AND k.key = %(key)s"
)
_KEEP = (
    "INSERT INTO {s}.idempotency_keys (caller, key, fingerprint, session, session_id, turn, first_turn) "
    "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
)
# Of several owners each takes rows that no other one has taken.
_SOME = (
    "(caller, key) IN (SELECT caller, key FROM {{s}}.idempotency_keys WHERE {condition} "
    "LIMIT %(limit)s FOR UPDATE SKIP LOCKED)"
)
_NOTE_GONE = "UPDATE {s}.idempotency_keys SET gone_at = %(now)s WHERE " + _SOME.format(
    condition="session IS NULL AND gone_at IS NULL"
)
_FORGET = "DELETE FROM {s}.idempotency_keys WHERE " + _SOME.format(condition="session IS NULL AND gone_at <= %(until)s")
_CUT_OFF = (
    "UPDATE {s}.idempotency_keys SET session = NULL WHERE (caller, key) IN ("
    "SELECT caller, key FROM {s}.idempotency_keys WHERE session = ANY(%s) LIMIT %s)"
)
CUT_OFF_MAX = 1000
"""The most keys that one step cuts off."""
_CUT_OFF_TURNS = "UPDATE {s}.idempotency_keys SET session = NULL WHERE session = %s AND turn = ANY(%s)"


def check(db: Db, key: IdempotencyKey | None, now: datetime) -> None:
    """Raises: RepeatedError: The key is kept."""
    if key is None:
        return
    row = db.execute(_FIND, {"now": moment(now), "caller": key.caller, "key": key.key}).fetchone()
    if row is not None:
        fingerprint, session_id, turn, first_turn, exists = row
        raise RepeatedError(
            fingerprint=bytes(fingerprint),
            session_id=session_id,
            turn_id=turn,
            first_turn_id=first_turn,
            is_gone=not exists,
        )


@contextmanager
def checked(db: Db, key: IdempotencyKey | None, now: datetime) -> Iterator[None]:
    """Check the key of a step before the step, and once more before the step is refused: it may have waited for a step
    with the same key, which has made what is now in its way.

    Raises:
        RepeatedError: The key is kept.
    """
    check(db, key, now)
    try:
        yield
    except RefusedError:
        check(db, key, now)
        raise


def keep(
    db: Db,
    key: IdempotencyKey | None,
    *,
    session: int,
    session_id: str,
    turn: str | None = None,
    first_turn: str | None = None,
    now: datetime,
) -> None:
    """Keep the key of a step, which :func:`check` has let pass, with what the step has made.

    Waits for a step of another owner with the same key.

    Raises:
        RepeatedError: That step has kept it.
    """
    if key is None:
        return
    values = (key.caller, key.key, key.fingerprint, session, session_id, turn, first_turn)
    if not db.execute(_KEEP, values).rowcount:
        check(db, key, now)
        raise AssertionError("a key that is forgotten is not kept anew by an owner that uses it")


def cut_off(db: Db, sessions: Sequence[int]) -> Cursor:
    """Cut some keys of removed sessions off from them. The result counts them: if they are :data:`CUT_OFF_MAX`, there
    may be more."""
    return db.execute(_CUT_OFF, (list(sessions), CUT_OFF_MAX))


def cut_off_turns(db: Db, session: int, turns: Sequence[str]) -> None:
    """Cut the keys of deleted turns off from them; ``turns`` are their ids."""
    db.execute(_CUT_OFF_TURNS, (session, list(turns)))


def forget(db: Db, now: datetime, limit: int) -> bool:
    """Forget some keys, as :meth:`~service.storage.store.Store.forget_keys` says."""
    noted = db.execute(_NOTE_GONE, {"now": moment(now), "limit": limit}).rowcount
    forgotten = db.execute(_FORGET, {"until": moment(rules.forgotten_until(now)), "limit": limit}).rowcount
    return limit in (noted, forgotten)
