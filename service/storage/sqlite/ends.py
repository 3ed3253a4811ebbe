"""The rows of a turn's end: the same for a normal end and for a recovery."""

from collections.abc import Collection, Sequence
from datetime import datetime

import apsw

from service.storage import rules
from service.storage.moments import moment
from service.storage.pieces import Run
from service.storage.records import TurnRecord
from service.storage.sqlite import documents, event_pages, removals
from service.storage.sqlite.rows import values_of

_COLUMNS = (
    "state",
    "started_at",
    "ended_at",
    "reason",
    "error",
    "finish_reason",
    "usage",
    "last_seq",
    "left_out",
    "message_items",
    "message_bytes",
    "output",
    "runs",
    "output_bytes",
    "text_length",
)
_END = f"UPDATE turns SET owner = NULL, {', '.join(f'{name} = :{name}' for name in _COLUMNS)} WHERE key = :key"
_COUNT = (
    "UPDATE sessions SET open_turns = open_turns + :open_turns, "
    # The owner of a session has an open turn of it: the others may all be suspended.
    "owner = CASE WHEN open_turns + :open_turns = 0 THEN NULL "
    f"WHEN EXISTS (SELECT 1 FROM turns WHERE owner = {rules.NOBODY} AND +session = :session) AND NOT EXISTS ("
    "SELECT 1 FROM turns WHERE owner = sessions.owner AND +session = :session AND key <> :turn) "
    f"THEN {rules.NOBODY} ELSE owner END, "
    "message_count = message_count + :message_count, input_tokens = input_tokens + :input_tokens, "
    "output_tokens = output_tokens + :output_tokens, reasoning_tokens = reasoning_tokens + :reasoning_tokens, "
    "cached_tokens = cached_tokens + :cached_tokens, last_accessed_at = :now, expires_at = :expires_at "
    "WHERE key = :session"
)


def keep_end(
    db: apsw.Connection,
    key: int,
    turn: TurnRecord,
    now: datetime,
    *,
    runs: Sequence[Run] | None,
    session: int,
    idle_timeout_s: float,
    terms: Collection[str] | None,
) -> None:
    """Keep the end of the open turn of this key, and what the end changes in its session, which is used at ``now``.

    An ephemeral turn is removed instead.

    Args:
        terms: The terms of the turn; None if they are to be cut and added later.
        runs: The turn's events; if they do not fit in the turn's row, they are in pages already. None if an earlier
            version has kept them.
    """
    counts = rules.counts_of_end(turn)
    db.execute(
        _COUNT,
        {
            "session": session,
            "turn": key,
            "open_turns": counts.open_turns,
            "message_count": counts.message_count,
            "input_tokens": counts.input_tokens,
            "output_tokens": counts.output_tokens,
            "reasoning_tokens": counts.reasoning_tokens,
            "cached_tokens": counts.cached_tokens,
            "now": moment(now),
            "expires_at": moment(rules.expires_at(now, idle_timeout_s)),
        },
    )
    if turn.ephemeral:
        removals.remove_ephemeral(db, key, turn, session=session)
        return
    values = values_of(turn)
    if runs is not None:
        values |= event_pages.end_columns(turn, runs)
        if values["runs"]:
            event_pages.drop(db, key)
    db.execute(_END, {name: values[name] for name in _COLUMNS} | {"key": key})
    db.execute("DELETE FROM outputs WHERE turn = ?", (key,))
    documents.add_turn(db, key, session, terms)
