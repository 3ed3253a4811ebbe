"""The rows of a turn's end: the same for a normal end and for a recovery."""

from collections.abc import Collection, Sequence
from datetime import datetime

import msgspec

from service.storage import rules
from service.storage.moments import moment
from service.storage.pieces import Run
from service.storage.postgres import documents, event_pages, idempotency, removals, segments, trees
from service.storage.postgres.connections import Db
from service.storage.postgres.rows import Row
from service.storage.postgres.turn_rows import parts, values_of
from service.storage.records import TurnRecord

_COUNTS = ("message_count", "input_tokens", "output_tokens", "reasoning_tokens", "cached_tokens")
_COLUMNS = {
    "state": "text",
    "started_at": "bigint",
    "ended_at": "bigint",
    "last_seq": "bigint",
    "message_items": "int",
    "message_bytes": "bigint",
    "messages": "int",
    "text_bytes": "bigint",
    "settings": "bytea",
    "output": "bytea",
    "runs": "bytea",
}
"""The columns of a turn that its end sets."""
_VALUES = {"id": "text", "now": "bigint", "terms": "text"} | dict.fromkeys(_COUNTS, "bigint") | _COLUMNS
"""What the statement has of each end."""

# First the sessions: a step that has locked one may wait for its turns.
_LOCKED = "locked AS (SELECT key FROM {s}.sessions WHERE id = ANY(%(sessions)s::text[]) ORDER BY key FOR NO KEY UPDATE)"
# With ``+ 0`` a turn is found by its id: an index of all open turns of the owner, or of all turns of the session, would
# be gone through for each.
_OWN = "turns.owner + 0 = %(owner)s AND turns.session + 0 IN (SELECT key FROM locked)"
_COUNT = f"""
UPDATE {{s}}.sessions SET open_turns = sessions.open_turns - it.ends,
    owner = CASE sessions.open_turns WHEN it.ends THEN NULL ELSE sessions.owner END,
    {", ".join(f"{name} = sessions.{name} + it.{name}" for name in _COUNTS)},
    last_accessed_at = it.now, expires_at = it.now + idle_us
FROM (
    SELECT session, count(*)::int AS ends, max(now) AS now,
        {", ".join(f"sum({name})::bigint AS {name}" for name in _COUNTS)} FROM own GROUP BY session
) AS it WHERE sessions.key = it.session
"""
_END = f"""
WITH {_LOCKED}, own AS (
    UPDATE {{s}}.turns SET owner = NULL, segment = NULL, {", ".join(f"{name} = it.{name}" for name in _COLUMNS)}
    FROM unnest({", ".join(f"%({name})s::{kind}[]" for name, kind in _VALUES.items())}) AS it ({", ".join(_VALUES)})
    WHERE turns.id = it.id AND {_OWN}
    RETURNING turns.id, turns.key, turns.session, it.now, it.terms, {", ".join(f"it.{name}" for name in _COUNTS)}
), counted AS ({_COUNT}), indexed AS ({documents.ADD_OWN}), dropped AS ({segments.DROP_OLD})
SELECT id, key FROM own
"""
_REMOVE = f"""
WITH {_LOCKED}, own AS (
    DELETE FROM {{s}}.turns WHERE turns.id = %(id)s AND {_OWN}
    RETURNING turns.session, parent, place, %(now)s::bigint AS now,
        {", ".join(f"%({name})s::bigint AS {name}" for name in _COUNTS)}
), counted AS ({_COUNT}), dropped AS ({segments.DROP_OLD})
SELECT own.session, own.parent, own.place, sessions.ephemeral
FROM own JOIN {{s}}.sessions ON sessions.key = own.session
"""
_BYTES_AT_ONCE = 1024 * 1024
"""The texts of turns that end by one statement."""


class End(msgspec.Struct, frozen=True):
    """The end of an open turn: the whole record, its events, the terms of its texts, and when its session was used.

    Attributes:
        terms: Not for an ephemeral turn, which no search has.
    """

    turn: TurnRecord
    runs: Sequence[Run]
    terms: Collection[str]
    now: datetime


def keep_ends(db: Db, ends: Sequence[End], *, owner: int) -> list[bool]:
    """Keep the ends of turns, and what they change in their sessions, which are used. Ephemeral turns are removed
    instead.

    To plan the statement takes PostgreSQL longer than to do it for one turn, so it is one for many. The ids of the
    turns differ.

    Args:
        owner: The owner of the turns.

    Returns:
        Of each end whether it was kept: whether the turn was open and this owner's.
    """
    kept: set[str] = set()
    lasting = [it for it in ends if not it.turn.ephemeral]
    for part in parts([it.turn for it in lasting], bytes_max=_BYTES_AT_ONCE):
        kept |= _keep(db, lasting[part], owner)
    for it in ends:
        if it.turn.ephemeral and _remove(db, it, owner):
            kept.add(it.turn.id)
    return [it.turn.id in kept for it in ends]


def _keep(db: Db, ends: Sequence[End], owner: int) -> set[str]:
    """Keep ends by one statement. Returns the ids of the turns that it has ended."""
    rows = [_values_of(it) for it in ends]
    values: dict[str, object] = {name: [row[name] for row in rows] for name in _VALUES}
    values |= {"ids": values["id"], "sessions": list({it.turn.session_id for it in ends}), "owner": owner}
    keys: dict[str, int] = dict(db.execute(_END, values).fetchall())
    in_pages = [it for it, row in zip(ends, rows, strict=True) if row["runs"] is None and it.turn.id in keys]
    if in_pages:
        event_pages.add(db, ((keys[it.turn.id], it.turn, it.runs) for it in in_pages))
    return set(keys)


def _values_of(end: End) -> dict[str, object]:
    turn = end.turn
    values = values_of(turn) | event_pages.values_of_events(turn, end.runs)
    return values | _counts_of(turn) | {"now": moment(end.now), "terms": " ".join(end.terms)}


def _counts_of(turn: TurnRecord) -> dict[str, object]:
    counts = rules.counts_of_end(turn)
    return {name: getattr(counts, name) for name in _COUNTS}


def _remove(db: Db, end: End, owner: int) -> bool:
    """Remove an ephemeral turn, and its session if it is of this turn only. Returns whether the turn was open and this
    owner's."""
    turn = end.turn
    values = {"id": turn.id, "ids": [turn.id], "sessions": [turn.session_id], "owner": owner, "now": moment(end.now)}
    row: Row | None = db.execute(_REMOVE, values | _counts_of(turn)).fetchone()
    if row is None:
        return False
    session, parent, place, is_alone = row
    if is_alone:
        removals.remove_empty(db, [session])
    else:
        trees.move_up(db, session, parent, place)
        idempotency.cut_off_turns(db, session, [turn.id])
    return True
