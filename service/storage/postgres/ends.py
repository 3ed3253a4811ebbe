"""The rows of a turn's end: the same for a normal end and for a recovery."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from datetime import datetime

import msgspec

from service.storage import rules
from service.storage.moments import moment
from service.storage.pieces import Run
from service.storage.postgres import documents, event_pages, idempotency, removals, segments, trees
from service.storage.postgres.connections import Cursor, Db
from service.storage.postgres.rows import Row
from service.storage.postgres.turn_rows import values_of
from service.storage.records import TurnRecord

# First the session: a step that has locked it may wait for the turn.
_LOCKED = "locked AS (SELECT key FROM {s}.sessions WHERE id = %(session_id)s FOR NO KEY UPDATE)"
_OWN = "id = %(id)s AND owner = %(owner)s AND session = (SELECT key FROM locked)"
_COUNT = """
UPDATE {s}.sessions SET open_turns = open_turns - 1, owner = CASE open_turns WHEN 1 THEN NULL ELSE sessions.owner END,
    message_count = message_count + %(message_count)s, input_tokens = input_tokens + %(input_tokens)s,
    output_tokens = output_tokens + %(output_tokens)s, reasoning_tokens = reasoning_tokens + %(reasoning_tokens)s,
    cached_tokens = cached_tokens + %(cached_tokens)s, last_accessed_at = %(now)s, expires_at = %(now)s + idle_us
FROM own WHERE sessions.key = own.session
"""
_END = f"""
WITH {_LOCKED}, own AS (
    UPDATE {{s}}.turns SET owner = NULL, segment = NULL, state = %(state)s, started_at = %(started_at)s,
        ended_at = %(ended_at)s, last_seq = %(last_seq)s, message_items = %(message_items)s,
        message_bytes = %(message_bytes)s, messages = %(messages)s, text_bytes = %(text_bytes)s,
        settings = %(settings)s, output = %(output)s, runs = %(runs)s
    WHERE {_OWN} RETURNING key, session
), counted AS ({_COUNT}), indexed AS ({documents.ADD_OWN}), dropped AS ({segments.DROP_OLD})
SELECT key FROM own
"""
_REMOVE = f"""
WITH {_LOCKED}, own AS (DELETE FROM {{s}}.turns WHERE {_OWN} RETURNING session, parent, place),
    counted AS ({_COUNT}), dropped AS ({segments.DROP_OLD})
SELECT own.session, own.parent, own.place, sessions.ephemeral
FROM own JOIN {{s}}.sessions ON sessions.key = own.session
"""


class End(msgspec.Struct, frozen=True):
    """The end of an open turn: the whole record, its events and the terms of its texts.

    Attributes:
        terms: Not for an ephemeral turn, which no search has.
    """

    turn: TurnRecord
    runs: Sequence[Run]
    terms: Collection[str]


def keep_ends(db: Db, ends: Sequence[End], now: datetime, *, owner: int) -> list[bool]:
    """Keep the ends of turns, and what they change in their sessions, which are used at ``now``. An ephemeral turn is
    removed instead.

    Args:
        owner: The owner of the turns.

    Returns:
        Of each end whether it was kept: whether the turn was open and this owner's.
    """
    with db.pipeline() if len(ends) > 1 else nullcontext():
        sent = [_send(db, it, now, owner) for it in ends]
    rows: list[Row | None] = [cursor.fetchone() for cursor, _ in sent]
    for it, row, (_, is_in_pages) in zip(ends, rows, sent, strict=True):
        if row is not None:
            _finish(db, it, row, is_in_pages=is_in_pages)
    return [row is not None for row in rows]


def _send(db: Db, end: End, now: datetime, owner: int) -> tuple[Cursor, bool]:
    """Run the statement of an end. Returns its result, and whether the turn is too long for one row."""
    turn = end.turn
    counts = rules.counts_of_end(turn)
    values: dict[str, object] = {
        "id": turn.id,
        "session_id": turn.session_id,
        "owner": owner,
        "now": moment(now),
        "message_count": counts.message_count,
        "input_tokens": counts.input_tokens,
        "output_tokens": counts.output_tokens,
        "reasoning_tokens": counts.reasoning_tokens,
        "cached_tokens": counts.cached_tokens,
    }
    if turn.ephemeral:
        return db.execute(_REMOVE, values), False
    values |= values_of(turn) | event_pages.values_of_events(turn, end.runs) | {"terms": " ".join(end.terms)}
    return db.execute(_END, values), values["runs"] is None


def _finish(db: Db, end: End, row: Row, *, is_in_pages: bool) -> None:
    """Keep what few ends need besides their statement, whose result is the row."""
    turn = end.turn
    if not turn.ephemeral:
        if is_in_pages:
            event_pages.add(db, [(row[0], turn, end.runs)])
        return
    session, parent, place, is_alone = row
    if is_alone:
        removals.remove_empty(db, [session])
    else:
        trees.move_up(db, session, parent, place)
        idempotency.cut_off_turns(db, session, [turn.id])
