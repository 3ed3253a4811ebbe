"""Suspended turns: open ones without an owner, with what was kept of them.

Their rows are those of running turns, with a checkpoint of all that was sent. Besides, the row in ``turns`` has the
items without their texts, as that of an ended turn whose texts are in pages, so that readers see them.
"""

from collections.abc import Sequence
from datetime import datetime

import apsw
import msgspec

from service.storage import rules, turn_options
from service.storage.moments import moment
from service.storage.records import SuspendedSession, TurnRecord, text_length
from service.storage.rules import NOBODY
from service.storage.sqlite.rows import Row, as_json, values_of

_COLUMNS = (
    "owner",
    "state",
    "started_at",
    "last_seq",
    "usage",
    "left_out",
    "options",
    "message_items",
    "message_bytes",
    "output",
    "output_bytes",
    "text_length",
)
_SET = f"UPDATE turns SET {', '.join(f'{name} = :{name}' for name in _COLUMNS)} WHERE key = :key"
# ``+`` makes SQLite search by owner: the open turns of one are few.
_RELEASE = (
    "UPDATE sessions SET last_accessed_at = :now, expires_at = :expires_at, owner = iif("
    f"EXISTS (SELECT 1 FROM turns WHERE owner = sessions.owner AND +session = :session), owner, {NOBODY}) "
    "WHERE key = :session"
)
_IS_SUSPENDED = f"SELECT 1 FROM turns WHERE id = ? AND +owner = {NOBODY}"
_WAITING = (
    "SELECT id, owner, state, options FROM turns "
    f"WHERE owner IN ({NOBODY}, :others) AND +session = :session ORDER BY ordinal"
)
_LIST = (
    f"SELECT waiting.id, substr(options, -{turn_options.TAIL_BYTES}) FROM turns JOIN ("
    f"SELECT key, id, last_accessed_at FROM sessions WHERE key IN (SELECT session FROM turns WHERE owner = {NOBODY}) "
    f"AND owner = {NOBODY} AND deletion = 0 ORDER BY last_accessed_at, id LIMIT ?"
    f") AS waiting ON waiting.key = session WHERE owner = {NOBODY} ORDER BY last_accessed_at, waiting.id"
)


def keep(db: apsw.Connection, key: int, turn: TurnRecord) -> None:
    """Give up the open turn of this key, whose events are in pages. ``turn`` has its output so far."""
    items = as_json(rules.without_texts(turn.output))
    values = values_of(turn) | {
        "owner": NOBODY,
        "output": items,
        "output_bytes": sum(len(item.text.encode()) for item in turn.output),
        "text_length": text_length(turn.output),
    }
    _set(db, key, values)
    db.execute("DELETE FROM outputs WHERE turn = ?", (key,))
    if turn.output:
        db.execute("INSERT INTO outputs (turn, after, items) VALUES (?, 0, ?)", (key, items))


def take(db: apsw.Connection, key: int, turn: TurnRecord, fence: int) -> None:
    """Make the suspended turn of this key an owner's."""
    _set(db, key, values_of(msgspec.structs.replace(turn, output=())) | {"owner": fence})


def _set(db: apsw.Connection, key: int, values: dict[str, object]) -> None:
    db.execute(_SET, {name: values[name] for name in _COLUMNS} | {"key": key})


def release(db: apsw.Connection, session: int, now: datetime, *, idle_timeout_s: float) -> None:
    """Note that a turn of a session was suspended. Without another open turn of its owner the session has none."""
    db.execute(
        _RELEASE,
        {
            "session": session,
            "now": moment(now),
            "expires_at": moment(rules.expires_at(now, idle_timeout_s)),
        },
    )


def note(db: apsw.Connection, session: int, *, open_turns: int) -> None:
    """Note the open turns of a session that was added, all of which are suspended."""
    if open_turns:
        db.execute(f"UPDATE sessions SET open_turns = ?, owner = {NOBODY} WHERE key = ?", (open_turns, session))


def is_suspended(db: apsw.Connection, turn_id: str) -> bool:
    return db.execute(_IS_SUSPENDED, (turn_id,)).fetchone() is not None


def first_waiting(db: apsw.Connection, session: int, *, others: int | None) -> str | None:
    """The first turn of a session that is suspended, or would be by a recovery from an owner that is gone."""
    rows: list[Row] = db.execute(_WAITING, {"session": session, "others": others}).fetchall()
    return turn_options.first_waiting(rows)


def list_page(db: apsw.Connection, *, limit: int) -> Sequence[SuspendedSession]:
    tails: dict[str, list[bytes | str | None]] = {}
    for session_id, tail in db.execute(_LIST, (limit,)):
        tails.setdefault(session_id, []).append(tail)
    return [SuspendedSession(id=it, awaits_client=turn_options.awaits_client(tails[it])) for it in tails]
