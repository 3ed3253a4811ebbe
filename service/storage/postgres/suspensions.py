"""Suspended turns: open ones without an owner, with what was kept of them.

They lie in rows as ended turns do whose texts are in pages: no owner's segments have anything of them.
"""

from collections.abc import Collection, Sequence
from datetime import datetime

import msgspec

from service.storage import turn_options
from service.storage.moments import moment
from service.storage.pieces import Run
from service.storage.postgres import event_pages
from service.storage.postgres.connections import Db
from service.storage.postgres.rows import Row
from service.storage.postgres.turn_rows import parts, values_of
from service.storage.records import SuspendedSession, SuspendedTurn, TurnRecord
from service.storage.rules import NOBODY

_BYTES_AT_ONCE = 4 * 1024 * 1024
"""The texts that are on their way to the server at once."""

_TYPES = {
    "id": "text",
    "state": "text",
    "started_at": "bigint",
    "last_seq": "bigint",
    "message_bytes": "bigint",
    "message_items": "int",
    "text_bytes": "bigint",
    "settings": "bytea",
    "output": "bytea",
}
# First the sessions: a step that has locked one may wait for its turns.
_LOCK = "SELECT key FROM {s}.sessions WHERE id = ANY(%(sessions)s) ORDER BY key FOR NO KEY UPDATE"
_SUSPEND = (
    f"UPDATE {{s}}.turns SET owner = {NOBODY}, segment = NULL, "
    f"{', '.join(f'{name} = it.{name}' for name in _TYPES if name != 'id')} "
    f"FROM unnest({', '.join(f'%({name})s::{kind}[]' for name, kind in _TYPES.items())}) AS it ({', '.join(_TYPES)}) "
    "WHERE turns.id = it.id AND owner = %(owner)s RETURNING turns.id, key, session"
)
_USE = (
    "UPDATE {s}.sessions SET last_accessed_at = %(now)s, expires_at = %(now)s + idle_us "
    "WHERE key = ANY(%(sessions)s::bigint[])"
)
# The owner of a session has an open turn of it.
_LEAVE = (
    f"UPDATE {{s}}.sessions SET owner = {NOBODY} WHERE {{which}} AND owner = %(owner)s AND open_turns > 0 "
    "AND key <> ALL(ARRAY(SELECT session FROM {s}.turns WHERE owner = %(owner)s))"
)
_LEAVE_BY_KEY = _LEAVE.replace("{which}", "key = ANY(%(sessions)s::bigint[])")
_LEAVE_BY_ID = _LEAVE.replace("{which}", "id = ANY(%(sessions)s::text[])")
_SUSPENDED = f"SELECT id FROM {{s}}.turns WHERE id = ANY(%s) AND owner = {NOBODY}"
_WAITING = (
    "SELECT id, owner, state, options FROM {s}.turns "
    f"WHERE session = %(session)s AND owner IN ({NOBODY}, %(others)s) ORDER BY ordinal"
)
_TAIL = f"substring(t.options FROM greatest(length(t.options) - {turn_options.TAIL_BYTES - 1}, 1))"
_LIST = (
    f"SELECT s.id, array_agg({_TAIL}) FROM {{s}}.turns AS t JOIN {{s}}.sessions AS s ON s.key = t.session "
    f"WHERE t.owner = {NOBODY} AND s.owner = {NOBODY} AND s.deletion IS NULL "
    "GROUP BY s.key ORDER BY s.last_accessed_at, s.id LIMIT %s"
)


class Suspension(msgspec.Struct, frozen=True):
    """An open turn with its output so far, and its events."""

    turn: TurnRecord
    runs: Sequence[Run]


def suspend(db: Db, suspended: Sequence[SuspendedTurn], now: datetime, *, owner: int) -> list[str]:
    """Suspend turns of an owner. Returns those that are neither its open turns nor suspended already."""
    db.execute(_LOCK, {"sessions": list({it.turn.session_id for it in suspended})})
    found, sessions = keep(db, [Suspension(it.turn, it.runs) for it in suspended], now, owner=owner)
    leave(db, sessions, owner=owner)
    others = [it.turn.id for it in suspended if it.turn.id not in found]
    if others:
        found |= {turn_id for (turn_id,) in db.execute(_SUSPENDED, (others,)).fetchall()}
    return [turn_id for turn_id in others if turn_id not in found]


def keep(db: Db, suspensions: Sequence[Suspension], now: datetime, *, owner: int) -> tuple[set[str], set[int]]:
    """Suspend turns in sessions whose rows are locked. Returns the ids of those that were the owner's, and the keys of
    their sessions, which are used at ``now``."""
    ids, sessions = set[str](), set[int]()
    for part in parts([it.turn for it in suspensions], bytes_max=_BYTES_AT_ONCE):
        some = suspensions[part]
        rows = [values_of(it.turn) | event_pages.values_in_pages(it.turn, it.runs) for it in some]
        values: dict[str, object] = {name: [row[name] for row in rows] for name in _TYPES}
        found = {row[0]: row[1:] for row in db.execute(_SUSPEND, values | {"owner": owner}).fetchall()}
        kept = [it for it in some if it.turn.id in found]
        event_pages.add(db, ((found[it.turn.id][0], it.turn, it.runs) for it in kept))
        ids |= found.keys()
        sessions |= {session for _, session in found.values()}
    if sessions:
        db.execute(_USE, {"now": moment(now), "sessions": list(sessions)})
    return ids, sessions


def leave(db: Db, sessions: Collection[int], *, owner: int) -> None:
    """Note of sessions, by their keys, that they have no owner any more: if all their open turns are suspended."""
    if sessions:
        db.execute(_LEAVE_BY_KEY, {"sessions": list(sessions), "owner": owner})


def leave_after_ends(db: Db, session_ids: Collection[str], *, owner: int) -> None:
    """:func:`leave` after the ends of turns."""
    if session_ids:
        db.execute(_LEAVE_BY_ID, {"sessions": list(session_ids), "owner": owner})


def note(db: Db, session: int, *, open_turns: int) -> None:
    """Note the open turns of a session that was added, all of which are suspended."""
    if open_turns:
        db.execute(f"UPDATE {{s}}.sessions SET open_turns = %s, owner = {NOBODY} WHERE key = %s", (open_turns, session))


def first_waiting(db: Db, session: int, *, others: int | None) -> str | None:
    """The first turn of a session that is suspended, or would be by a recovery from an owner that is gone."""
    rows: list[Row] = db.execute(_WAITING, {"session": session, "others": others}).fetchall()
    return turn_options.first_waiting(rows)


def list_page(db: Db, *, limit: int) -> Sequence[SuspendedSession]:
    """One statement."""
    rows: list[Row] = db.execute(_LIST, (limit,)).fetchall()
    return [SuspendedSession(id=row[0], awaits_client=turn_options.awaits_client(row[1])) for row in rows]
